//! The GPU layer on a GPU: memory, launches, sharing with the host, and what it refuses.

use std::sync::atomic::Ordering;

use mirage_runtime::gpu::{
    DeviceBuffer, Event, Function, Gpu, GpuError, LaunchConfig, MappedBuffer, Module,
    StagingBuffer, Stream,
};

/// `out[i] = in[i] + add` for `i < count`, and then a flag for the host. PTX, so that no compiler is needed.
const ADD: &str = "
.version 7.0
.target sm_70
.address_size 64
.visible .entry add(.param .align 8 .b8 params[32])
{
    .reg .pred %p; .reg .b32 %r<8>; .reg .b64 %d<8>;
    ld.param.u64 %d0, [params];
    ld.param.u64 %d1, [params+8];
    ld.param.u64 %d2, [params+16];
    ld.param.u32 %r0, [params+24];
    ld.param.u32 %r1, [params+28];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r2, %r2, %r3, %r4;
    setp.ge.u32 %p, %r2, %r0;
    @%p bra done;
    mul.wide.u32 %d3, %r2, 4;
    add.u64 %d0, %d0, %d3;
    add.u64 %d1, %d1, %d3;
    ld.global.u32 %r5, [%d0];
    add.u32 %r5, %r5, %r1;
    st.global.u32 [%d1], %r5;
    mov.u32 %r6, 1;
    st.release.sys.global.u32 [%d2], %r6;
done:
    ret;
}
\0";

#[repr(C)]
#[derive(Clone, Copy)]
struct Add {
    input: u64,
    output: u64,
    flag: u64,
    count: u32,
    add: u32,
}

struct Fixture {
    gpu: Gpu,
    stream: Stream,
    add: Function,
}

fn fixture() -> Fixture {
    let gpu = Gpu::open(0).expect("these tests need a GPU");
    let stream = Stream::new(&gpu).unwrap();
    let add = Module::load(&gpu, ADD.as_bytes())
        .unwrap()
        .function("add")
        .unwrap();
    Fixture { gpu, stream, add }
}

#[test]
fn a_kernel_reads_and_writes_device_and_mapped_memory() {
    let Fixture { gpu, stream, add } = fixture();
    let data: Vec<u32> = (0..1000).collect();
    let input = DeviceBuffer::from_slice(&gpu, &data).unwrap();
    let output = DeviceBuffer::<u32>::zeroed(&gpu, data.len()).unwrap();
    let flag = MappedBuffer::zeroed(&gpu, 1).unwrap();
    assert!(output.to_vec(&stream).unwrap().iter().all(|&x| x == 0));
    let params = Add {
        input: input.device_pointer(),
        output: output.device_pointer(),
        flag: flag.device_pointer(),
        count: 1000,
        add: 7,
    };
    // SAFETY: the addresses are those of live buffers of `count` elements.
    unsafe { add.launch(&stream, LaunchConfig::linear(8, 128), &params) }.unwrap();
    stream.synchronize().unwrap();
    assert_eq!(flag.words()[0].load(Ordering::Acquire), 1);
    let expect: Vec<u32> = data.iter().map(|x| x + 7).collect();
    assert_eq!(output.to_vec(&stream).unwrap(), expect);
}

#[test]
fn cooperative_grids_that_do_not_fit_are_refused() {
    let Fixture { gpu, stream, add } = fixture();
    let buffer = DeviceBuffer::<u32>::zeroed(&gpu, 1024).unwrap();
    let address = buffer.device_pointer();
    let params = Add {
        input: address,
        output: address,
        flag: address,
        count: 0,
        add: 0,
    };
    let fit = add.max_blocks_per_sm(1024, 0).unwrap() * gpu.sm_count();
    assert!(fit >= gpu.sm_count());
    let config = |blocks: usize| LaunchConfig::linear(u32::try_from(blocks).unwrap(), 1024);
    // SAFETY: with a count of 0 the kernel touches nothing.
    unsafe { add.launch_cooperative(&stream, config(fit), &params) }.unwrap();
    // SAFETY: as above.
    let refused = unsafe { add.launch_cooperative(&stream, config(fit + 1), &params) };
    assert_eq!(
        refused,
        Err(GpuError::TooManyBlocks {
            function: "add".into(),
            asked: fit + 1,
            limit: fit
        })
    );
    stream.synchronize().unwrap();
}

#[test]
fn a_captured_graph_replays_its_launches() {
    let Fixture { gpu, stream, add } = fixture();
    let buffer = DeviceBuffer::from_slice(&gpu, &[10u32]).unwrap();
    let flag = DeviceBuffer::<u32>::zeroed(&gpu, 1).unwrap();
    let address = buffer.device_pointer();
    let params = Add {
        input: address,
        output: address,
        flag: flag.device_pointer(),
        count: 1,
        add: 2,
    };
    let mut graph = stream
        .capture::<GpuError>(|| {
            for _ in 0..3 {
                // SAFETY: the buffers outlive every replay below.
                unsafe { add.launch(&stream, LaunchConfig::linear(1, 32), &params) }?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(
        buffer.to_vec(&stream).unwrap(),
        [10],
        "recording must not run"
    );
    let (start, end) = (Event::new(&gpu).unwrap(), Event::new(&gpu).unwrap());
    start.record(&stream).unwrap();
    for _ in 0..2 {
        // SAFETY: the buffers are alive.
        unsafe { graph.launch(&stream) }.unwrap();
    }
    end.record(&stream).unwrap();
    assert!(end.milliseconds_since(&start).unwrap() > 0.0);
    assert_eq!(buffer.to_vec(&stream).unwrap(), [22]);
}

#[test]
fn copies_keep_to_their_ranges() {
    let Fixture { gpu, stream, .. } = fixture();
    let mut buffer = DeviceBuffer::<u32>::zeroed(&gpu, 8).unwrap();
    buffer.copy_from(&stream, 2, &[1, 2, 3]).unwrap();
    assert_eq!(buffer.to_vec(&stream).unwrap(), [0, 0, 1, 2, 3, 0, 0, 0]);
    let mut end = [7; 3];
    buffer.copy_to(&stream, 4, &mut end).unwrap();
    assert_eq!(end, [3, 0, 0]);
    let outside = buffer.copy_from(&stream, 6, &[0; 3]);
    assert_eq!(
        outside,
        Err(GpuError::Range {
            start: 6,
            end: 9,
            length: 8
        })
    );
    buffer.clear(&stream).unwrap();
    assert_eq!(buffer.to_vec(&stream).unwrap(), [0; 8]);
}

#[test]
fn staging_memory_is_filled_again_only_after_its_copy() {
    let Fixture { gpu, stream, .. } = fixture();
    const LENGTH: usize = 1 << 20;
    let mut host = StagingBuffer::<u32>::zeroed(&gpu, LENGTH).unwrap();
    assert!(host.is_page_locked());
    let mut device = DeviceBuffer::<u32>::zeroed(&gpu, 8 * LENGTH).unwrap();
    for turn in 0..8u32 {
        let mut idle = host.wait().unwrap();
        idle.fill(turn + 1);
        let start = turn as usize * LENGTH;
        idle.send(&stream, LENGTH, &mut device, start).unwrap();
    }
    drop(host);
    let values = device.to_vec(&stream).unwrap();
    for (turn, values) in values.chunks(LENGTH).enumerate() {
        assert!(values.iter().all(|&value| value == turn as u32 + 1));
    }
    let mut copy = DeviceBuffer::<u32>::zeroed(&gpu, 8).unwrap();
    copy.enqueue_copy_of(&stream, 5, &device, 2).unwrap();
    assert_eq!(copy.to_vec(&stream).unwrap(), [0, 0, 0, 0, 0, 1, 1, 0]);

    let mut small = StagingBuffer::<u32>::zeroed(&gpu, 4).unwrap();
    let range = |start, end, length| Err(GpuError::Range { start, end, length });
    let mut send = |length, to: &mut _, start| {
        let idle = small.wait().unwrap();
        idle.send(&stream, length, to, start)
    };
    assert_eq!(send(5, &mut device, 0), range(0, 5, 4));
    assert_eq!(send(4, &mut copy, 6), range(6, 10, 8));
    assert_eq!(copy.enqueue_copy_of(&stream, 7, &device, 2), range(7, 9, 8));
    let short = DeviceBuffer::<u32>::zeroed(&gpu, 1).unwrap();
    assert_eq!(copy.enqueue_copy_of(&stream, 0, &short, 2), range(0, 2, 1));
}

#[test]
fn what_cannot_work_is_refused_with_numbers() {
    let Fixture { gpu, add, .. } = fixture();
    let total = gpu.properties().total_memory;
    match DeviceBuffer::<u8>::zeroed(&gpu, 2 * total).map(|_| ()) {
        Err(GpuError::OutOfMemory {
            asked,
            free,
            total: all,
            ..
        }) => {
            assert_eq!(asked, 2 * total);
            assert!(free <= all);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        add.set_dynamic_shared_bytes(1 << 20),
        Err(GpuError::SharedMemory { .. })
    ));
    assert!(matches!(
        Module::load(&gpu, b"not code"),
        Err(GpuError::Image { .. })
    ));
    let module = Module::load(&gpu, ADD.as_bytes()).unwrap();
    assert!(matches!(
        module.function("sub"),
        Err(GpuError::NoFunction { .. })
    ));
    assert!(matches!(
        Gpu::open(4096),
        Err(GpuError::NoSuchDevice { .. })
    ));
}
