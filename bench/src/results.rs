//! The results of a run, as the JSON file holds them and every report reads them.
//!
//! Owns the data model, its version, and no arithmetic beyond what [`SidePoint`] and its like derive from the raw
//! iterations: reports only format. Field names are the JSON's; `bench/results.schema.json` is generated from here.
//! Times are in milliseconds unless a name says otherwise.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::{Estimate, Summary};

/// Version of the format. Raised when a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 2;

/// Everything of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Results {
    /// [`SCHEMA_VERSION`] of the program that wrote it.
    pub schema_version: u32,
    /// Program and version.
    pub generator: String,
    /// When the run ended: local time with its offset, RFC 3339.
    pub generated: String,
    /// False where the run ended early; what was measured until then is there.
    pub complete: bool,
    /// Why it ended early: `interrupted`, or which side failed and what it said.
    pub ended_early: Option<String>,
    /// Where it ran.
    pub device: DeviceFacts,
    /// What was run.
    pub model: ModelFacts,
    /// How.
    pub configuration: Configuration,
    /// On which prompts.
    pub prompts: PromptFacts,
    /// The engines compared.
    pub sides: Vec<SideFacts>,
    /// One entry for each batch size and context depth.
    pub points: Vec<Point>,
    /// Over all batch sizes.
    pub summary: Vec<SummaryRow>,
    /// A text that the model wrote on the way, for people to look at.
    pub sample: Option<Sample>,
    /// What a reader must know before believing a number.
    pub notes: Vec<String>,
}

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// An NVIDIA GPU.
    Cuda,
    /// The host's processor.
    Cpu,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceFacts {
    /// GPU or CPU.
    pub kind: DeviceKind,
    /// Its name, as it gives it.
    pub name: String,
    /// Driver version, of a GPU.
    pub driver: Option<String>,
    /// Memory in MiB, of a GPU.
    pub memory_mib: Option<u64>,
    /// Processor of the host.
    pub host_cpu: String,
    /// Threads the host runs at once.
    pub host_threads: usize,
    /// Operating system and architecture.
    pub os: String,
    /// Streaming read bandwidth in GB/s, measured in this run.
    pub bandwidth_gb_s: Option<f64>,
    /// State after the first run, with its clocks raised, of a GPU.
    pub before: Option<DeviceState>,
    /// State after the last run.
    pub after: Option<DeviceState>,
    /// What about the state makes the numbers doubtful.
    pub warnings: Vec<String>,
}

/// A GPU's state at one moment. Absent where the driver does not say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceState {
    /// SM clock in MHz.
    pub sm_clock_mhz: Option<f64>,
    /// Memory clock in MHz.
    pub memory_clock_mhz: Option<f64>,
    /// Temperature in degrees Celsius.
    pub temperature_c: Option<f64>,
    /// Power draw in watts.
    pub power_w: Option<f64>,
    /// Reasons for which clocks are held down, as a bit mask in hexadecimal (NVML's clocks event reasons).
    pub throttle_reasons: Option<String>,
    /// Share of the GPU's time in use over the last sampling period, in percent.
    pub utilization_percent: Option<f64>,
}

/// The model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelFacts {
    /// As it was asked for.
    pub name: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Layers.
    pub layers: usize,
    /// Tokens there are.
    pub vocabulary: usize,
    /// Longest sequence it was trained for.
    pub context: usize,
    /// Bytes of weights that one decode step must read.
    pub step_bytes: u64,
    /// Bytes of keys and values that a step must read for each position before it.
    pub kv_bytes_per_position: u64,
    /// BLAKE3 of the weights, or of what identifies them.
    pub weights_hash: String,
    /// BLAKE3 of the operator graph's text.
    pub graph_hash: String,
}

/// The flags of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Configuration {
    /// New tokens of each prompt.
    pub max_tokens: usize,
    /// 0 for greedy.
    pub temperature: f32,
    /// Probability that the tokens chosen from have together.
    pub top_p: f32,
    /// Iterations that are not counted.
    pub num_warmup: usize,
    /// Iterations that are.
    pub num_iterations: usize,
    /// Sequences at once.
    pub batch_sizes: Vec<usize>,
    /// Positions before the first new token; empty for the prompts as they are.
    pub context_depths: Vec<usize>,
    /// Of the prompts' order and of sampling.
    pub seed: u64,
    /// Whether tokens that end a text are ignored.
    pub ignore_eos: bool,
}

/// The prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptFacts {
    /// The file.
    pub file: String,
    /// The categories chosen; empty for the whole file.
    pub categories: Vec<String>,
    /// BLAKE3 of the chosen prompts' ids and texts, in the file's order.
    pub hash: String,
    /// Prompts of the chosen categories, those left out included.
    pub count: usize,
    /// Those of them that were left out, and why.
    pub skipped: Vec<Skipped>,
}

/// A prompt that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Skipped {
    /// Which.
    pub prompt: String,
    /// Why.
    pub reason: String,
}

/// What a side stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The engine under test.
    Mirage,
    /// What it is compared with, in the same process.
    Baseline,
    /// Another engine, whose numbers were measured elsewhere and are only quoted.
    External,
}

/// One engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SideFacts {
    /// Short name that points refer to: `mirage`, `b0`, `b1`.
    pub key: String,
    /// Name for people.
    pub label: String,
    /// What it is, in a sentence.
    pub description: String,
    /// What it stands for.
    pub role: Role,
}

/// One batch size at one depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Point {
    /// Sequences at once.
    pub batch: usize,
    /// Positions before the first new token, where all prompts were brought to that length.
    pub context_depth: Option<usize>,
    /// Why nothing was measured, where nothing was.
    pub refused: Option<String>,
    /// Whether the sides agree; none where there is only one.
    pub gate: Option<Gate>,
    /// What each side took.
    pub sides: Vec<SidePoint>,
    /// Mirage against every other side that it may be compared with.
    pub speedups: Vec<Speedup>,
    /// Why there are no speedups, where the sides were not comparable.
    pub withheld: Option<String>,
    /// External sides whose numbers are quoted without a speedup.
    pub only_quoted: Vec<OnlyQuoted>,
}

/// An external side that mirage is not compared with at a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OnlyQuoted {
    /// Key of the side.
    pub side: String,
    /// Why there is no speedup against it.
    pub reason: String,
}

/// Whether a point's sides compute the same thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gate {
    /// Key of the side that the others are compared with: mirage's, or the first baseline's where mirage is left out.
    pub tested: String,
    /// Whether all comparisons held.
    pub passed: bool,
    /// The tested side with each of the others.
    pub comparisons: Vec<Agreement>,
}

/// How far two sides agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Agreement {
    /// The other side's key.
    pub side: String,
    /// Whether it is enough.
    pub passed: bool,
    /// Greedy sequences compared.
    pub sequences: usize,
    /// Those with the same tokens to the end.
    pub identical: usize,
    /// Greedy tokens compared, up to a sequence's first difference.
    pub tokens: usize,
    /// Rows of teacher-forced logits compared.
    pub rows: usize,
    /// Root mean square of the logits' differences over that of the baseline's logits around their mean: all rows.
    pub logit_error: f64,
    /// The same of the worst row.
    pub worst_row_error: f64,
    /// What was not within the bounds.
    pub failures: Vec<String>,
}

/// What a side needed before it could be measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Setup {
    /// Seconds to compile, from graph to machine code.
    pub compile_s: Option<f64>,
    /// Whether machine code came from a cache.
    pub compile_cached: bool,
    /// Seconds to bring the weights where they are used.
    pub load_s: f64,
    /// Launches that one decode step, or one generation, takes, in words.
    pub launches: Option<String>,
    /// What the planner predicted for a decode step, in microseconds.
    pub predicted_step_us: Option<f64>,
}

/// One side at one point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SidePoint {
    /// Key of the side.
    pub side: String,
    /// Before the measurement.
    pub setup: Setup,
    /// Every counted iteration.
    pub iterations: Vec<Iteration>,
    /// Host time of a batch.
    pub latency_ms: Summary,
    /// New tokens a second, all sequences together.
    pub throughput: Summary,
    /// New tokens a second of one sequence: the reciprocal of TPOT.
    pub throughput_per_user: Option<Summary>,
    /// Device time of a batch.
    pub device_ms: Option<Summary>,
    /// Time to first token: from the batch's start to a sequence's first token at the host.
    pub ttft_ms: Option<Summary>,
    /// Time per output token: last minus first token's time, over the tokens between, by sequence. Only of sequences
    /// that every side of the point has a time for.
    pub tpot_ms: Option<Summary>,
    /// Inter-token latency: each time between two successive tokens of a sequence.
    pub itl_ms: Option<Summary>,
    /// A decode step against the memory's bandwidth.
    pub roofline: Option<Roofline>,
    /// By category of the prompts.
    pub categories: Vec<CategoryRow>,
    /// Bandwidth of the matrix products, of a baseline that tells.
    pub matrix_products: Vec<MatrixProduct>,
}

/// One batch, generated once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Iteration {
    /// Number, from 0. Equal numbers are equal work on all sides.
    pub index: usize,
    /// Place among the sides in this iteration, from 0.
    pub turn: usize,
    /// Host time.
    pub latency_ms: f64,
    /// New tokens.
    pub tokens: usize,
    /// New tokens a second.
    pub throughput: f64,
    /// Device time.
    pub device_ms: Option<f64>,
    /// Device time of a decode step.
    pub device_step_ms: Option<f64>,
    /// Its sequences; empty of an external engine.
    pub sequences: Vec<SequenceRow>,
}

/// One sequence of an iteration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SequenceRow {
    /// Prompt.
    pub prompt: String,
    /// Its tokens.
    pub prompt_tokens: usize,
    /// New tokens.
    pub tokens: usize,
    /// Time to first token.
    pub ttft_ms: f64,
    /// Time per output token; none with less than two tokens, and where `latency_ms` has none.
    pub tpot_ms: Option<f64>,
    /// When the last token was there; none where a side of this point did not see when this sequence ended, and then on
    /// all sides, so that means are of the same sequences.
    pub latency_ms: Option<f64>,
}

/// A decode step against the least that any engine must read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Roofline {
    /// Bytes a step must read: all weights once, and the keys and values of a mean position.
    pub step_bytes: f64,
    /// Those bytes at the measured bandwidth, in microseconds.
    pub floor_us: f64,
    /// What a step took, in microseconds.
    pub step_us: f64,
    /// Where `step_us` comes from.
    pub clock: String,
    /// Floor over time. None where it came out above 1, which means that a measurement is wrong.
    pub share: Option<f64>,
}

/// A side's numbers for the prompts of one category.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CategoryRow {
    /// Category.
    pub category: String,
    /// Sequences measured.
    pub sequences: usize,
    /// Mean tokens of their prompts.
    pub mean_prompt_tokens: f64,
    /// Mean time to first token.
    pub ttft_ms: f64,
    /// Mean time per output token, of the sequences that have one.
    pub tpot_ms: Option<f64>,
    /// Mean time to the last token, of the sequences that have one.
    pub latency_ms: Option<f64>,
}

/// Matrix products of one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MatrixProduct {
    /// What they compute, as the graph names it.
    pub values: Vec<String>,
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// How many a step has.
    pub launches: usize,
    /// Time of one, in microseconds.
    pub time_us: f64,
    /// Bandwidth reached on the matrix, in GB/s.
    pub gb_s: f64,
}

/// Mirage against one other side: above 1 is faster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Speedup {
    /// Key of the other side.
    pub against: String,
    /// Other latency over mirage's.
    pub latency: Estimate,
    /// Mirage's throughput over the other.
    pub throughput: Estimate,
    /// Other device time over mirage's.
    pub device: Option<Estimate>,
}

/// Mirage against one other side, over all batch sizes: geometric means of the points' speedups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SummaryRow {
    /// Key of the other side.
    pub against: String,
    /// Points that went in.
    pub points: usize,
    /// Of the latencies.
    pub latency: Estimate,
    /// Of the throughputs.
    pub throughput: Estimate,
    /// Of the device times.
    pub device: Option<Estimate>,
}

/// A prompt and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// What mirage, or the only side there is, wrote, greedily.
    pub text: String,
}

impl Results {
    /// The side of that key.
    pub fn side(&self, key: &str) -> Option<&SideFacts> {
        self.sides.iter().find(|side| side.key == key)
    }

    /// The label of the side of that key.
    pub fn label<'a>(&'a self, key: &'a str) -> &'a str {
        self.side(key).map_or(key, |side| &side.label)
    }

    /// The side that the headline is against: the per-op baseline in a CUDA graph, else the plainest baseline there is.
    /// Never an external engine: its numbers are quoted, not checked. Never our own fused phases (`b2`) where there is
    /// another: they are half of mirage.
    pub fn headline(&self) -> Option<&SideFacts> {
        let baseline = |side: &&SideFacts| side.role == Role::Baseline;
        let graph = self.side("b1").filter(baseline);
        graph.or_else(|| self.sides.iter().find(baseline))
    }
}

impl Point {
    /// What this side took here.
    pub fn side(&self, key: &str) -> Option<&SidePoint> {
        self.sides.iter().find(|side| side.side == key)
    }

    /// Mirage's speedup against that side.
    pub fn speedup(&self, key: &str) -> Option<&Speedup> {
        self.speedups.iter().find(|speedup| speedup.against == key)
    }
}
