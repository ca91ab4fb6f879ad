//! The command line: what it takes and what `--help` says.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use mirage_compiler::arch::Arch;
use mirage_compiler::plan::{Plan, Target};

const EXAMPLES: &str = "\
Examples:
  mirage-compile graphs/qwen3.ron                          Qwen3-0.6B for an H100
  mirage-compile graphs/qwen3.ron --model ~/Qwen3-8B       the sizes of a checkpoint
  mirage-compile graphs/qwen3.ron --arch sm_80 --batch 8   for an A100, eight sequences at once
  mirage-compile graphs/qwen3.ron --profile mine.ron       for the GPU that mirage-calibrate measured";

/// What a run's exit code says.
const EXIT_CODES: &str = "\
Exit codes:
  0  everything was written
  1  the graph, the checkpoint or the output folder is at fault; stderr says where, and the mend
  2  the command line is at fault
  3  the CUDA source was written, but no cubin: NVRTC is missing or too old; stderr says what to install
  4  mirage itself is at fault; stderr says what to report

Environment:
  MIRAGE_NVRTC      libnvrtc.so.13 or its folder, where it is in no usual place
  MIRAGE_CACHE_DIR  where cubins are kept [default: $XDG_CACHE_HOME/mirage, ~/.cache/mirage]
  NO_COLOR          set to anything: no colours in a terminal either";

/// Compiles a decoder's operator graph into one persistent CUDA kernel.
///
/// Needs no GPU and no CUDA toolkit.
#[derive(Parser)]
#[command(name = "mirage-compile", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct Args {
    /// The operators of the decoder, e.g. graphs/qwen3.ron.
    pub(crate) graph: PathBuf,

    /// Checkpoint folder in the Hugging Face layout; its config.json gives the sizes [default: those in GRAPH]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,

    /// GPU architecture to compile for: sm_80 (A100), sm_86 (RTX 3090), sm_89 (RTX 4090), sm_90a (H100, H200),
    /// sm_100a (B200) or sm_120a (RTX 5090).
    #[arg(long, default_value_t = Arch::Sm90a)]
    pub(crate) arch: Arch,

    /// Compile for the GPU that mirage-calibrate measured, with its constants [default: the H100's, scaled to --arch]
    #[arg(long, value_name = "FILE", conflicts_with = "arch")]
    pub(crate) profile: Option<PathBuf>,

    /// Sequences that are generated at once, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to(Target::MAX_COLUMNS))]
    pub(crate) batch: u32,

    /// Longest sequence in tokens, prompt included: what the KV cache has room for.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = up_to(Plan::MAX_SEQ))]
    pub(crate) max_seq: u32,

    /// Folder for the output, made if it is not there [default: out/ and the graph's name]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

fn up_to(most: usize) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..=most as u64)
}
