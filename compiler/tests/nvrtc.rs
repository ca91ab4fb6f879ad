//! Compiles real cubins with the real NVRTC, for every architecture. Needs no GPU.
//!
//! Where NVRTC is missing these tests fail and say what to install: a compiler whose
//! output nobody compiled is not tested.

use mirage_compiler::arch::Arch;
use mirage_compiler::nvrtc::{Nvrtc, NvrtcError, Options, Source};

fn nvrtc() -> Nvrtc {
    Nvrtc::find().unwrap_or_else(|error| panic!("{error}"))
}

fn source(text: &str) -> Source {
    Source {
        name: "kernel.cu".to_owned(),
        text: text.to_owned(),
        headers: vec![(
            "math/twice.cuh".to_owned(),
            "#pragma once\ninline float twice(float x) { return 2 * x; }".to_owned(),
        )],
    }
}

/// Uses a header by a path, a default execution space, shared memory and a barrier.
const KERNEL: &str = r#"#include "math/twice.cuh"
extern "C" __global__ void __launch_bounds__(32) scale(float* values) {
    __shared__ float staged[32];
    staged[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = twice(staged[31 - threadIdx.x]);
}
"#;

#[test]
fn every_arch_gives_a_cubin() {
    let nvrtc = nvrtc();
    for arch in Arch::ALL {
        let compiled = nvrtc
            .compile(&source(KERNEL), arch, &Options::default())
            .unwrap();
        assert_eq!(&compiled.cubin[..4], b"\x7fELF", "{arch}");
        let ptx = String::from_utf8(compiled.ptx.unwrap()).unwrap();
        assert!(ptx.contains(&format!(".target {arch}")), "{arch}: {ptx}");
        assert_eq!(compiled.log, "", "{arch}");
        let [scale] = &compiled.resources[..] else {
            panic!("{arch}: {:?}", compiled.resources)
        };
        assert_eq!(
            (scale.name.as_str(), scale.shared_bytes),
            ("scale", 128),
            "{arch}"
        );
        assert!(scale.registers > 0, "{arch}");
        assert_eq!(
            scale.spill_store_bytes + scale.spill_load_bytes + scale.stack_bytes,
            0,
            "{arch}"
        );
    }
}

#[test]
fn spills_are_reported() {
    let text = r#"
extern "C" __global__ void crowded(const float* in, float* out) {
    float live[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) live[i] = in[i * 32 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) out[(63 - i) * 32 + threadIdx.x] = live[i] * in[i];
}
"#;
    let options = Options {
        extra: vec!["--maxrregcount=24".to_owned()],
        ..Options::default()
    };
    let compiled = nvrtc()
        .compile(&source(text), Arch::Sm90a, &options)
        .unwrap();
    let crowded = &compiled.resources[0];
    assert!(
        crowded.spill_store_bytes > 0 && crowded.spill_load_bytes > 0,
        "{crowded:?}"
    );
    assert!(crowded.registers <= 24, "{crowded:?}");
}

#[test]
fn the_same_source_gives_the_same_cubin() {
    let nvrtc = nvrtc();
    let compile = || {
        nvrtc
            .compile(&source(KERNEL), Arch::Sm80, &Options::default())
            .unwrap()
            .cubin
    };
    assert_eq!(compile(), compile());
}

#[test]
fn line_info_is_off_unless_asked_for() {
    let nvrtc = nvrtc();
    let has_lines = |line_info| {
        let options = Options {
            line_info,
            ..Options::default()
        };
        let cubin = nvrtc
            .compile(&source(KERNEL), Arch::Sm90a, &options)
            .unwrap()
            .cubin;
        cubin
            .windows(b".debug_line".len())
            .any(|window| window == b".debug_line")
    };
    assert!(!has_lines(false));
    assert!(has_lines(true));
}

#[track_caller]
fn check_error(source: &Source, options: &Options, expect: &[&str]) -> NvrtcError {
    let error = nvrtc().compile(source, Arch::Sm90a, options).unwrap_err();
    let message = error.to_string();
    for part in expect {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
    error
}

#[test]
fn errors_name_the_line() {
    let plain = Options::default();
    let text = "extern \"C\" __global__ void k() {\n    undefined_thing();\n}\n";
    let error = check_error(
        &source(text),
        &plain,
        &[
            "kernel.cu does not compile for sm_90a:\n",
            "kernel.cu(2): error: identifier \"undefined_thing\" is undefined",
        ],
    );
    assert!(matches!(error, NvrtcError::Compile { .. }));
    // The generator's #line directives decide what the message names.
    check_error(
        &source(&format!("#line 40 \"device/gemv.cuh\"\n{text}")),
        &plain,
        &["device/gemv.cuh(41): error"],
    );
    check_error(
        &source("#include \"nope.cuh\""),
        &plain,
        &["cannot open source file \"nope.cuh\""],
    );
    // ptxas' errors are compile errors too.
    check_error(
        &source("__global__ void k() { asm volatile(\"foo.bar;\"); }"),
        &plain,
        &["Not a name of any known instruction: 'foo'"],
    );
    check_error(
        &source("int a;\0"),
        &plain,
        &["kernel.cu holds a NUL byte at offset 6"],
    );
    let unknown = Options {
        extra: vec!["--nonsense".to_owned()],
        ..Options::default()
    };
    check_error(
        &source(KERNEL),
        &unknown,
        &["nvrtcCompileProgram failed", "--nonsense"],
    );
}

#[test]
fn threads_may_share_it() {
    let nvrtc = nvrtc();
    let cubins: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    nvrtc
                        .compile(&source(KERNEL), Arch::Sm80, &Options::default())
                        .unwrap()
                        .cubin
                })
            })
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(cubins.windows(2).all(|pair| pair[0] == pair[1]));
}
