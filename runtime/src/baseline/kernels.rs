//! The baseline's device code: its parameters as the device declares them, its source, and the loaded kernels.
//!
//! Owns the agreement of host and device: every parameter struct here has the layout of the struct of the same name in
//! `compiler/device/baseline/`, and the generated source asserts each size. It must not decide what is launched.

use std::fmt::Write;
use std::mem::size_of;

use bytemuck::{Pod, Zeroable};
use mirage_compiler::arch::Arch;
use mirage_compiler::cubin_cache;
use mirage_compiler::nvrtc::{Options, Source};

use super::BaselineError;
use crate::gpu::{Function, Gpu, Module};

/// Elements of a 16-byte access, `kVector`.
pub(super) const VECTOR: usize = 8;
/// Threads of an attention block, `kAttentionThreads`.
pub(super) const ATTENTION_THREADS: u32 = 128;
/// Most ranges of positions that attention is split into, `kMaxSplits`.
pub(super) const MAX_SPLITS: usize = 32;
/// Threads of a sampling block, `kSampleThreads`.
pub(super) const SAMPLE_THREADS: u32 = 256;
/// Counters of a row's histogram, `kBins`.
pub(super) const SAMPLE_BINS: usize = 2048;
/// Launches that find one cutoff, each 11 bits of it.
pub(super) const SELECT_DIGITS: u32 = 3;

/// Queries that an attention block takes at most in its tile: more would spill registers.
const QUERIES: usize = 8;

macro_rules! headers {
    ($($name:literal => $file:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../compiler/device/", $file)))),*]
    };
}

/// Include names as the sources write them, and the texts.
const HEADERS: [(&str, &str); 9] = headers![
    "../random.cuh" => "random.cuh",
    "common.cuh" => "baseline/common.cuh",
    "attention.cuh" => "baseline/attention.cuh",
    "elementwise.cuh" => "baseline/elementwise.cuh",
    "kv_append.cuh" => "baseline/kv_append.cuh",
    "rms_norm.cuh" => "baseline/rms_norm.cuh",
    "rope.cuh" => "baseline/rope.cuh",
    "sample.cuh" => "baseline/sample.cuh",
    "take_rows.cuh" => "baseline/take_rows.cuh",
];

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ElementwiseParams {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) out: u64,
    pub(super) vectors: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct TakeRowsParams {
    pub(super) table: u64,
    pub(super) index: u64,
    pub(super) out: u64,
    pub(super) vectors: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RmsNormParams {
    pub(super) input: u64,
    pub(super) gamma: u64,
    pub(super) out: u64,
    pub(super) groups: u32,
    pub(super) vectors: u32,
    pub(super) eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RopeParams {
    pub(super) input: u64,
    pub(super) out: u64,
    pub(super) turns: u64,
    pub(super) position: u64,
    pub(super) rows: u32,
    pub(super) heads: u32,
    pub(super) half_vectors: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct KvAppendParams {
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) slot: u64,
    pub(super) position: u64,
    pub(super) rows: u32,
    pub(super) kv_heads: u32,
    pub(super) vectors: u32,
    pub(super) positions: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttentionParams {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) out: u64,
    pub(super) partial: u64,
    pub(super) arrived: u64,
    pub(super) tiles: u64,
    pub(super) slot: u64,
    pub(super) position: u64,
    pub(super) positions: u32,
    pub(super) scale: f32,
}

/// What a request asks of the sampler, for one sequence.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Sampling {
    pub(super) seed: u64,
    pub(super) inverse_temperature: f32,
    pub(super) top_p: f32,
    pub(super) top_k: u32,
    pub(super) sequence: u32,
}

/// What the sampling launches of one row hand on to each other.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct SampleState {
    pub(super) best: u64,
    pub(super) target: u64,
    pub(super) max_key: u32,
    pub(super) cutoff: u32,
    pub(super) prefix: u32,
    pub(super) arrived: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SampleParams {
    pub(super) logits: u64,
    pub(super) sampling: u64,
    pub(super) state: u64,
    pub(super) histogram: u64,
    pub(super) row: u64,
    pub(super) slot: u64,
    pub(super) position: u64,
    pub(super) next_token: u64,
    pub(super) next_position: u64,
    pub(super) made: u64,
    pub(super) history: u64,
    pub(super) vocab: u32,
    pub(super) capacity: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SampleSelectParams {
    pub(super) sample: SampleParams,
    pub(super) digit: u32,
    pub(super) weighted: u32,
}

/// Sizes that an attention kernel is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AttentionShape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share a KV head.
    pub(super) fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows of one sequence that a block takes together in a prefill.
    pub(super) fn tile(self) -> usize {
        (QUERIES / self.group()).max(1)
    }

    /// Sizes of tile that there is a kernel for, each once.
    fn tiles(self) -> impl Iterator<Item = usize> {
        let tile = self.tile();
        std::iter::once(1).chain((tile > 1).then_some(tile))
    }

    /// Floats of a block's part of the result, for a tile of `tile` rows.
    pub(super) fn partial(self, tile: usize) -> usize {
        self.group() * tile * (self.head_dim + 2)
    }

    /// The rule of `attention.cuh` that the shape breaks, if any.
    pub(super) fn check(self) -> Result<(), String> {
        if ![16, 32, 64, 128, 256].contains(&self.head_dim) {
            return Err(format!(
                "heads have {} elements, and must have 16, 32, 64, 128 or 256",
                self.head_dim
            ));
        }
        // The parts of the four warps lie in shared memory.
        if 4 * 4 * self.partial(self.tile()) > 40 * 1024 {
            return Err(format!(
                "{} query heads of {} elements share a KV head",
                self.group(),
                self.head_dim
            ));
        }
        Ok(())
    }
}

/// The loaded kernels.
pub(super) struct Kernels {
    pub(super) silu: Function,
    pub(super) mul: Function,
    pub(super) add: Function,
    pub(super) take_rows: Function,
    pub(super) rms_norm_wide: Function,
    pub(super) rms_norm_narrow: Function,
    pub(super) rope: Function,
    pub(super) kv_append: Function,
    pub(super) sample_max: Function,
    pub(super) sample_select: Function,
    pub(super) sample_pick: Function,
    pub(super) attention: Vec<AttentionKernels>,
}

/// The kernels of one attention shape.
pub(super) struct AttentionKernels {
    pub(super) shape: AttentionShape,
    /// A block for each row.
    pub(super) single: Function,
    /// A block for a tile of rows.
    pub(super) tiled: Function,
}

impl Kernels {
    /// Compiles the kernels for `gpu` and loads them.
    pub(super) fn load(gpu: &Gpu, attention: &[AttentionShape]) -> Result<Self, BaselineError> {
        let (major, minor) = gpu.properties().compute_capability;
        let unknown = || BaselineError::UnknownGpu {
            gpu: gpu.name().to_owned(),
            arch: gpu.arch(),
        };
        let arch = Arch::for_device(major, minor).ok_or_else(unknown)?;
        let fetched = cubin_cache::fetch(&source(attention), arch, &Options::default())?;
        let module = Module::load(gpu, &fetched.compiled.cubin)?;
        let attention = attention.iter().enumerate().map(|(index, shape)| {
            let [single, tiled] =
                [1, shape.tile()].map(|tile| module.function(&attention_name(index, tile)));
            Ok(AttentionKernels {
                shape: *shape,
                single: single?,
                tiled: tiled?,
            })
        });
        Ok(Self {
            silu: module.function("silu")?,
            mul: module.function("mul")?,
            add: module.function("add")?,
            take_rows: module.function("take_rows")?,
            rms_norm_wide: module.function("rms_norm_wide")?,
            rms_norm_narrow: module.function("rms_norm_narrow")?,
            rope: module.function("rope")?,
            kv_append: module.function("kv_append")?,
            sample_max: module.function("sample_max")?,
            sample_select: module.function("sample_select")?,
            sample_pick: module.function("sample_pick")?,
            attention: attention.collect::<Result<_, BaselineError>>()?,
        })
    }
}

/// Name of the kernel of attention shape `index` for tiles of `tile` rows.
fn attention_name(index: usize, tile: usize) -> String {
    format!("attention_{index}_tile_{tile}")
}

/// The program: all headers, the attention kernels of the shapes needed, and the sizes that host and device agree on.
pub(super) fn source(attention: &[AttentionShape]) -> Source {
    let mut text = String::new();
    for (name, _) in HEADERS.iter().filter(|(name, _)| !name.starts_with("..")) {
        let _ = writeln!(text, "#include \"{name}\"");
    }
    text.push_str("\nnamespace mirage {\n\n");
    for (index, shape) in attention.iter().enumerate() {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
        } = shape;
        for tile in shape.tiles() {
            // One block for each multiprocessor: registers are better spent on loads in flight than on more blocks.
            let _ = writeln!(
                text,
                "extern \"C\" __global__ void __launch_bounds__(kAttentionThreads, 1) {}(const AttentionParams p) {{\n  \
                 Attention<{heads}, {kv_heads}, {head_dim}, {tile}>::run(p);\n}}",
                attention_name(index, tile)
            );
        }
    }
    let sizes = [
        ("ElementwiseParams", size_of::<ElementwiseParams>()),
        ("TakeRowsParams", size_of::<TakeRowsParams>()),
        ("RmsNormParams", size_of::<RmsNormParams>()),
        ("RopeParams", size_of::<RopeParams>()),
        ("KvAppendParams", size_of::<KvAppendParams>()),
        ("AttentionParams", size_of::<AttentionParams>()),
        ("Sampling", size_of::<Sampling>()),
        ("SampleState", size_of::<SampleState>()),
        ("SampleParams", size_of::<SampleParams>()),
        ("SampleSelectParams", size_of::<SampleSelectParams>()),
    ];
    for (name, size) in sizes {
        let _ = writeln!(
            text,
            "static_assert(sizeof({name}) == {size}, \"host and device disagree on {name}\");"
        );
    }
    let constants = [
        ("kVector", VECTOR),
        ("kAttentionThreads", ATTENTION_THREADS as usize),
        ("kMaxSplits", MAX_SPLITS),
        ("kSampleThreads", SAMPLE_THREADS as usize),
        ("kBins", SAMPLE_BINS),
    ];
    for (name, value) in constants {
        let _ = writeln!(
            text,
            "static_assert({name} == {value}, \"host and device disagree on {name}\");"
        );
    }
    text.push_str("\n}  // namespace mirage\n");
    Source {
        name: "baseline.cu".to_owned(),
        text,
        headers: HEADERS
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use mirage_compiler::nvrtc::Nvrtc;

    use super::*;

    /// Qwen3-0.6B, whose tiles have several rows; the largest group, of Qwen3-32B; a small test model.
    const SHAPES: [AttentionShape; 3] = [
        AttentionShape {
            heads: 16,
            kv_heads: 8,
            head_dim: 128,
        },
        AttentionShape {
            heads: 64,
            kv_heads: 8,
            head_dim: 128,
        },
        AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
        },
    ];

    #[test]
    fn the_kernels_compile_for_every_architecture() {
        let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
        for arch in Arch::ALL {
            let compiled = nvrtc
                .compile(&source(&SHAPES), arch, &Options::default())
                .unwrap();
            assert_eq!(compiled.log, "", "{arch}");
            for kernel in &compiled.resources {
                let spilled = kernel.spill_store_bytes + kernel.spill_load_bytes;
                assert_eq!(spilled, 0, "{arch}: {kernel:?}");
            }
        }
    }

    #[test]
    fn tiles_keep_to_the_registers() {
        let check = |heads, kv_heads, tile| {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim: 128,
            };
            assert_eq!((shape.tile(), shape.check()), (tile, Ok(())));
        };
        check(16, 8, 4);
        check(40, 8, 1);
        check(8, 8, 8);
    }

    #[test]
    fn shapes_without_a_kernel_are_named() {
        let check = |heads, kv_heads, head_dim, part: &str| {
            let rule = AttentionShape {
                heads,
                kv_heads,
                head_dim,
            }
            .check()
            .unwrap_err();
            assert!(rule.contains(part), "{rule}");
        };
        check(8, 8, 96, "96 elements");
        check(32, 1, 128, "32 query heads");
    }
}
