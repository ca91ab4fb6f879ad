//! The command line: the flags and defaults of the benchmark guide, and ours.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{ArgAction, Parser, ValueEnum};
use mirage_runtime::sampler::SamplingParams;

/// Sequences at once that the megakernel's tiles hold.
pub const MAX_BATCH: usize = 64;
/// The prompts that are built in where the default file is not there.
pub const DEFAULT_PROMPTS: &str = "test_prompts.txt";

const EXAMPLES: &str = "\
Examples:
  mirage-bench                                              the guide's basic run: Qwen3-0.6B, batches 1 2 4 8
  mirage-bench --model models/tiny --device cpu             no GPU and no download needed
  mirage-bench --skip-baseline                              only mirage, faster
  mirage-bench --num-warmup 10 --num-iterations 10 --batch-sizes 1 2 4 8 16
  mirage-bench --context-depth 512 2000 --max-tokens 100    decoding deep in a context
  mirage-bench --compare old.json                           exit code 4 where mirage became slower";

const EXIT_CODES: &str = "\
Exit codes:
  0    measured, and the sides agree
  1    the model, a file or the device is at fault; stderr says where, and the mend
  2    the command line is at fault
  3    the sides do not compute the same thing: no speedup is given
  4    --compare: mirage is slower than before
  5    nothing was measured: at every batch size there was no room, or the sides did unequal work
  6    --compare: the two runs have no work in common that could be compared
  130  interrupted; the outputs hold what was measured until then, if anything was";

/// Compares mirage's megakernel with per-op baselines on the same prompts, weights and token ids.
#[derive(Clone, Debug, Parser)]
#[command(name = "mirage-bench", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub struct Args {
    /// Checkpoint folder, or an id of the local Hugging Face cache.
    #[arg(long, value_name = "MODEL", default_value = "Qwen/Qwen3-0.6B")]
    pub model: String,

    /// Operator graph [default: by the checkpoint's model_type]
    #[arg(long, value_name = "FILE")]
    pub graph: Option<PathBuf>,

    /// Prompts, one a line; the default's are built in where there is no such file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PROMPTS)]
    pub prompts: PathBuf,

    /// Use only these categories of the prompt file.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub categories: Vec<String>,

    /// New tokens of each prompt, at most.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = RangedU64ValueParser::<u32>::new().range(1..=1 << 20))]
    pub max_tokens: u32,

    /// Sampling temperature; 0 takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f32,

    /// Probability that the tokens sampled from have together.
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = top_p, allow_negative_numbers = true)]
    pub top_p: f32,

    /// Iterations before the counted ones, for each batch size.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = RangedU64ValueParser::<u32>::new().range(0..=100_000))]
    pub num_warmup: u32,

    /// Counted iterations, for each batch size.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = RangedU64ValueParser::<u32>::new().range(1..=100_000))]
    pub num_iterations: u32,

    /// Sequences generated at once, 1 to 64 each.
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1, 2, 4, 8], value_parser = RangedU64ValueParser::<u32>::new().range(1..=MAX_BATCH as u64))]
    pub batch_sizes: Vec<u32>,

    /// Measure only mirage.
    #[arg(long)]
    pub skip_baseline: bool,

    /// Measure only the baseline.
    #[arg(long, conflicts_with = "skip_baseline")]
    pub skip_mirage: bool,

    /// Baselines [default: b0 b1 b2 on a GPU, reference on the CPU]
    #[arg(long, value_name = "NAME", num_args = 1.., value_enum, conflicts_with = "skip_baseline")]
    pub baseline: Vec<BaselineName>,

    /// Where to run; auto takes the CPU where there is no usable GPU.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Plan with what mirage-calibrate measured on this GPU [default: the H100's constants, scaled]
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,

    /// Of the prompts' order and of sampling; equal seeds give equal work.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Make max-tokens tokens whatever the model says, so that both sides do equal work; --ignore-eos=false stops at
    /// end-of-text tokens.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = ArgAction::Set)]
    pub ignore_eos: bool,

    /// Bring every prompt to these lengths, to measure decoding deep in a context.
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_parser = RangedU64ValueParser::<u32>::new().range(1..=1 << 20))]
    pub context_depth: Vec<u32>,

    /// Text report.
    #[arg(long, value_name = "FILE", default_value = "benchmark_report.txt")]
    pub output_report: PathBuf,

    /// All results, every iteration.
    #[arg(long, value_name = "FILE", default_value = "benchmark_results.json")]
    pub output_json: PathBuf,

    /// Report with charts as one HTML page.
    #[arg(long, value_name = "FILE", default_value = "benchmark_report.html")]
    pub output_html: PathBuf,

    /// Compare with an older result file.
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,

    /// Slowdown in percent that --compare lets pass.
    #[arg(long, value_name = "PERCENT", default_value_t = 2.0, value_parser = tolerance, requires = "compare", allow_negative_numbers = true)]
    pub tolerance: f64,

    /// Add another engine's measured numbers to the report (bench/external/vllm.py writes such files).
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub external: Vec<PathBuf>,

    /// Tell what is done.
    #[arg(long, short)]
    pub verbose: bool,
}

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// The first GPU, else the CPU.
    Auto,
    /// The first GPU.
    Cuda,
    /// The CPU executor.
    Cpu,
}

/// A baseline by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum BaselineName {
    /// GPU: one launch for each operator.
    B0,
    /// GPU: the same in a CUDA graph.
    B1,
    /// GPU: mirage's fused phases as separate kernels in a CUDA graph.
    B2,
    /// CPU: the plain reference.
    Reference,
}

fn temperature(text: &str) -> Result<f32, String> {
    let temperature = text.parse().map_err(|_| "it is not a number".to_owned())?;
    let params = SamplingParams {
        temperature,
        ..SamplingParams::default()
    };
    params
        .validate()
        .map(|()| temperature)
        .map_err(|error| error.to_string())
}

fn top_p(text: &str) -> Result<f32, String> {
    let top_p = text.parse().map_err(|_| "it is not a number".to_owned())?;
    let params = SamplingParams {
        top_p,
        ..SamplingParams::default()
    };
    params
        .validate()
        .map(|()| top_p)
        .map_err(|error| error.to_string())
}

fn tolerance(text: &str) -> Result<f64, String> {
    let percent: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    let valid = (0.0..100.0).contains(&percent);
    valid
        .then_some(percent)
        .ok_or_else(|| "it must be from 0 to below 100".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(format!("mirage-bench {line}").split_whitespace())
    }

    #[test]
    fn the_guides_defaults() {
        Args::command().debug_assert();
        let args = parse("").expect("no flags are needed");
        assert_eq!(args.model, "Qwen/Qwen3-0.6B");
        assert_eq!(args.prompts.to_str(), Some("test_prompts.txt"));
        assert_eq!(
            (args.max_tokens, args.temperature, args.top_p),
            (50, 0.8, 0.95)
        );
        assert_eq!((args.num_warmup, args.num_iterations), (5, 5));
        assert_eq!(args.batch_sizes, [1, 2, 4, 8]);
        assert!(!args.skip_baseline && !args.skip_mirage && !args.verbose);
        assert_eq!(args.output_report.to_str(), Some("benchmark_report.txt"));
        assert_eq!(args.output_json.to_str(), Some("benchmark_results.json"));
        assert!(args.ignore_eos);
    }

    #[test]
    fn the_guides_full_command() {
        let args = parse(
            "--model Qwen/Qwen3-0.6B --prompts test_prompts.txt --max-tokens 100 --temperature 0.7 --top-p 0.9 --num-warmup 10 \
             --num-iterations 10 --batch-sizes 1 4 8 16 --output-report my_report.txt --output-json my_results.json --verbose",
        );
        let args = args.expect("the guide's own example");
        assert_eq!(args.batch_sizes, [1, 4, 8, 16]);
        assert_eq!(
            (args.max_tokens, args.num_warmup, args.verbose),
            (100, 10, true)
        );
    }

    #[test]
    fn ignoring_eos_is_said_three_ways() {
        assert!(parse("--ignore-eos").expect("bare").ignore_eos);
        assert!(
            parse("--ignore-eos=true --verbose")
                .expect("with a value")
                .ignore_eos
        );
        assert!(
            !parse("--ignore-eos=false")
                .expect("with a value")
                .ignore_eos
        );
    }

    #[test]
    fn bad_values_are_refused() {
        for line in [
            "--max-tokens 0",
            "--max-tokens many",
            "--temperature -1",
            "--temperature nan",
            "--top-p 0",
            "--top-p 1.5",
            "--num-iterations 0",
            "--num-warmup -1",
            "--batch-sizes 0",
            "--batch-sizes 65",
            "--batch-sizes",
            "--batch-sizes 1,2",
            "--device tpu",
            "--baseline b9",
            "--skip-baseline --skip-mirage",
            "--skip-baseline --baseline b1",
            "--tolerance 3",
            "--compare a.json --tolerance -3",
            "--context-depth 0",
            "--unknown",
            "stray",
        ] {
            assert!(parse(line).is_err(), "{line} was taken");
        }
    }
}
