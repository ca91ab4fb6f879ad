//! CUDA source: a thin `kernel.cu` of constants and phase sequences over the device library in `device/`.
//!
//! Owns the text of `kernel.cu`; every computation is in the `.cuh` files, which are carried as they are. A verified
//! program always emits; names that reach the source are identifiers behind a prefix.

use std::fmt::Write;

use crate::arch::Arch;
use crate::fuse::Epilogue;
use crate::mesh::Split;
use crate::plan::Transport;
use crate::program::{Along, Exchange, Linear, Norm, Phase, Program, Rows, step_epochs};

/// Name of the kernel's entry point.
pub const ENTRY: &str = "mirage_generate";
/// Name of the kernel beside it that puts weights into the order of the streams (`device/repack.cuh`).
pub const REPACK_ENTRY: &str = "mirage_repack";

/// A CUDA translation unit with its headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaSource {
    /// The text of `kernel.cu`.
    pub text: String,
    /// Include name and text of every header.
    pub headers: Vec<(String, String)>,
}

macro_rules! headers {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../device/", $name)))),*]
    };
}

const HEADERS: [(&str, &str); 26] = headers![
    "attention.cuh",
    "attention_rows.cuh",
    "candidates.cuh",
    "context.cuh",
    "draws.cuh",
    "exchange.cuh",
    "generate.cuh",
    "grid.cuh",
    "head.cuh",
    "heads.cuh",
    "kept.cuh",
    "kv_cache.cuh",
    "linear.cuh",
    "mirage.cuh",
    "prelude.cuh",
    "radix.cuh",
    "random.cuh",
    "repack.cuh",
    "residual.cuh",
    "ring.cuh",
    "rows.cuh",
    "sampling.cuh",
    "stream_rows.cuh",
    "tasks.cuh",
    "trace.cuh",
    "words.cuh",
];

const ARCH_SM_80: &str = include_str!("../device/arch/sm_80.cuh");
const ARCH_SM_90: &str = include_str!("../device/arch/sm_90.cuh");

/// Emits the kernel of a program for an architecture.
pub fn cuda_source(program: &Program, arch: Arch) -> CudaSource {
    let mut emitter = Emitter {
        program,
        out: String::new(),
    };
    emitter.kernel();
    CudaSource {
        text: emitter.out,
        headers: headers_for(arch),
    }
}

impl CudaSource {
    /// The same kernel with its timeline: it records when each CTA passed which mark (`device/trace.cuh`).
    pub fn traced(&self) -> CudaSource {
        CudaSource {
            text: format!("#define MIRAGE_TRACE\n{}", self.text),
            headers: self.headers.clone(),
        }
    }
}

/// The device library that every kernel needs, as an architecture has it.
pub(crate) fn headers_for(arch: Arch) -> Vec<(String, String)> {
    let arch_text = match arch {
        Arch::Sm80 | Arch::Sm86 | Arch::Sm89 => ARCH_SM_80,
        Arch::Sm90a | Arch::Sm100a | Arch::Sm120a => ARCH_SM_90,
    };
    let mut headers: Vec<(String, String)> = HEADERS
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect();
    headers.push(("arch.cuh".to_owned(), arch_text.to_owned()));
    headers
}

/// The type of a node of the graph. Names of the graph stay as they are, behind a prefix that nothing else has.
fn node_type(name: &str) -> String {
    format!("Node_{name}")
}

fn float(value: f32) -> String {
    format!("{value:e}f")
}

struct Emitter<'a> {
    program: &'a Program,
    out: String,
}

/// Writes one line of source. Writing to a string cannot fail.
macro_rules! line {
    ($emitter:expr) => { $emitter.out.push('\n') };
    ($emitter:expr, $($arg:tt)*) => {{
        let _ = writeln!($emitter.out, $($arg)*);
    }};
}

mod phased;
mod steps;

pub use phased::{PhasedSource, phased_source};

impl Emitter<'_> {
    fn kernel(&mut self) {
        self.head_of_file(
            "mirage.cuh",
            "Constants and the order of phases; the phases themselves are in the headers.",
        );
        self.end_namespace();
        line!(self);
        line!(
            self,
            "extern \"C\" __global__ void __launch_bounds__(mirage::kThreads, 1)"
        );
        line!(
            self,
            "    {ENTRY}(const __grid_constant__ mirage::Params params) {{"
        );
        line!(self, "  mirage::generate<mirage::Model>(params);");
        line!(self, "}}");
    }

    /// Up to the model; the namespace stays open.
    fn head_of_file(&mut self, header: &str, about: &str) {
        let p = self.program;
        line!(
            self,
            "// {} for {} sequences of up to {} positions, compiled by mirage. Do not edit.",
            p.name,
            p.slots,
            p.max_seq
        );
        line!(self, "// {about}");
        line!(self, "#include \"{header}\"");
        line!(self);
        line!(self, "namespace mirage {{");
        line!(self);
        self.mesh();
        self.memory();
        for linear in p.linears.iter().chain([&p.head]) {
            self.linear(linear);
        }
        self.attention();
        self.exchanges();
        self.model();
    }

    fn end_namespace(&mut self) {
        line!(self);
        line!(self, "}}  // namespace mirage");
    }

    fn constant(&mut self, name: &str, value: impl std::fmt::Display) {
        line!(self, "  static constexpr int {name} = {value};");
    }

    fn flag(&mut self, name: &str, value: bool) {
        line!(self, "  static constexpr bool {name} = {value};");
    }

    fn mesh(&mut self) {
        let mesh = self.program.mesh;
        line!(self, "struct Mesh {{");
        self.constant("kGroups", mesh.groups);
        self.constant("kMembers", mesh.members);
        self.constant("kWorkers", mesh.workers());
        self.constant("kCtas", mesh.ctas);
        line!(self, "}};");
        line!(self);
    }

    fn memory(&mut self) {
        let p = self.program;
        for (name, ring) in ["Ring", "WideRing"].into_iter().zip(p.rings()) {
            line!(self, "struct {name} {{");
            self.constant("kPages", ring.pages);
            self.constant("kPageBytes", ring.page_bytes);
            self.constant("kInFlight", ring.in_flight);
            self.constant("kHeadInFlight", ring.head_in_flight);
            line!(self, "}};");
            line!(self);
        }
        line!(self, "// Shared memory: {} bytes.", p.shared.bytes);
        line!(self, "struct Shared {{");
        for region in &p.shared.regions {
            self.constant(&format!("k{}", region.name), region.at);
        }
        // All else of wide steps lies where it lies in other steps.
        let wide = p.wide.iter().flat_map(|wide| &wide.shared.regions);
        for region in wide.filter(|region| region.name == "Pages") {
            self.constant("kWidePages", region.at);
        }
        if !p
            .shared
            .regions
            .iter()
            .any(|region| region.name == "Stream")
        {
            line!(
                self,
                "  static constexpr int kStream = 0;  // no step keeps the whole stream"
            );
        }
        line!(self, "}};");
        line!(self);
    }

    fn linear(&mut self, linear: &Linear) {
        let t = &linear.tiling;
        let made_of = if linear.sources.is_empty() {
            String::new()
        } else {
            format!(": {}", comment(&linear.sources))
        };
        line!(self, "// {} x {}{made_of}", linear.rows(), linear.columns);
        let is_head = std::ptr::eq(linear, &self.program.head);
        let name = if is_head {
            "Head".to_owned()
        } else {
            node_type(&linear.name)
        };
        line!(self, "struct {name} {{");
        self.constant("kRowUnits", linear.row_units);
        self.constant("kUnitTiles", linear.unit_tiles);
        self.constant("kKTiles", linear.k_tiles);
        self.flag("kRowsOverGroups", linear.placement.groups == Split::Rows);
        self.flag("kRowsOverMembers", linear.placement.members == Split::Rows);
        self.flag("kRowsExact", t.rows_exact);
        self.flag("kKExact", t.k_exact);
        self.constant("kPasses", t.passes);
        self.constant("kPassTiles", t.pass_tiles);
        self.constant("kTilesPerWarp", t.tiles_per_warp);
        self.constant("kWarpRows", t.warp_rows);
        self.constant("kWarpK", t.warp_k());
        self.constant("kPageK", t.page_k);
        self.constant("kWidth", linear.width());
        self.flag("kSwiGlu", linear.epilogue == Epilogue::SwiGlu);
        self.norm("", linear.norm.as_ref());
        self.constant("kNormWidth", linear.columns);
        self.constant("kPassWords", linear.pass_words());
        self.constant("kWords", linear.words());
        self.constant("kWordsAt", linear.words_at);
        if !is_head {
            self.constant("kMostK", t.k);
            self.constant("kOutputs", linear.outputs());
            self.rows("", &linear.rows);
            self.rows("Stream", &linear.stream_rows);
        }
        if is_head {
            self.constant("kVocab", self.program.vocab);
        }
        line!(self, "}};");
        line!(self);
    }

    fn rows(&mut self, prefix: &str, rows: &Rows) {
        self.constant(&format!("k{prefix}RowsAt"), rows.at);
        self.constant(&format!("k{prefix}FlagsAt"), rows.flags_at);
    }

    fn norm(&mut self, prefix: &str, norm: Option<&Norm>) {
        self.flag(&format!("k{prefix}Norm"), norm.is_some());
        let gamma_at = norm.map_or(0, |norm| norm.gamma_at);
        self.constant(&format!("k{prefix}GammaAt"), gamma_at);
        let eps = float(norm.map_or(0.0, |norm| norm.eps));
        line!(self, "  static constexpr float k{prefix}Eps = {eps};");
        if prefix.is_empty() {
            let stride = norm.map_or(0, |norm| norm.gamma_stride);
            self.constant("kGammaStride", stride);
        }
    }

    fn attention(&mut self) {
        let p = self.program;
        let a = &p.attention;
        line!(self, "// {}", comment(&a.sources));
        line!(self, "struct {} {{", node_type(&a.name));
        self.constant("kHeads", a.heads);
        self.constant("kKvHeads", a.kv_heads);
        self.constant("kAllKvHeads", a.kv_heads * p.mesh.groups);
        self.constant("kHeadDim", a.head_dim);
        self.constant("kHeadsPerTask", a.heads_per_task);
        // Scores in powers of two: exp(x) = exp2(x log2 e).
        line!(
            self,
            "  static constexpr float kScale = {};",
            float(a.scale * std::f32::consts::LOG2_E)
        );
        self.norm("Q", a.q_norm.as_ref());
        self.norm("K", a.k_norm.as_ref());
        self.constant("kGammaStride", p.norms.layer_stride);
        self.constant("kWidth", a.width());
        self.constant("kSlots", p.slots);
        self.constant("kMaxSeq", p.max_seq);
        self.constant("kWordsAt", a.words_at);
        self.constant("kOutputs", a.outputs() * p.mesh.groups);
        self.rows("", &a.rows);
        line!(self, "}};");
        line!(self);
    }

    /// Every view of a linear's output that a phase takes, once.
    fn exchanges(&mut self) {
        let mut seen: Vec<Exchange> = Vec::new();
        for (_, step) in self.program.steps() {
            for phase in &step.layer {
                let exchange = match phase {
                    Phase::Attention { exchange, .. }
                    | Phase::Collect { exchange, .. }
                    | Phase::AddToStream { exchange, .. }
                    | Phase::ReduceScatter { exchange, .. }
                    | Phase::GatherStream { exchange, .. } => *exchange,
                    Phase::Linear(_) | Phase::CollectHeads { .. } => continue,
                };
                if !seen.contains(&exchange) {
                    seen.push(exchange);
                }
            }
        }
        for exchange in seen {
            let along = |a: Along| match a {
                Along::Own => "kOwn",
                Along::Concat => "kConcat",
                Along::Sum => "kSum",
            };
            line!(self, "struct {} {{", self.view(&exchange));
            line!(
                self,
                "  typedef {} Source;",
                self.linear_name(exchange.source)
            );
            line!(
                self,
                "  static constexpr Along kGroups = Along::{};",
                along(exchange.groups)
            );
            line!(
                self,
                "  static constexpr Along kMembers = Along::{};",
                along(exchange.members)
            );
            line!(self, "}};");
            line!(self);
        }
    }

    fn linear_name(&self, index: usize) -> String {
        node_type(&self.program.linears[index].name)
    }

    /// Type of an exchange. One linear is read in one way only.
    fn view(&self, exchange: &Exchange) -> String {
        format!("From_{}", self.program.linears[exchange.source].name)
    }

    fn model(&mut self) {
        let p = self.program;
        line!(self, "struct Model {{");
        line!(self, "  typedef mirage::Mesh Mesh;");
        line!(self, "  typedef mirage::Ring Ring;");
        if p.wide.is_some() {
            line!(self, "  typedef mirage::WideRing WideRing;");
        }
        line!(self, "  typedef mirage::Shared Shared;");
        line!(self, "  typedef mirage::Head Head;");
        self.constant("kLayers", p.layers);
        self.constant("kMaxSeq", p.max_seq);
        self.constant("kRopePairs", p.attention.head_dim / 2);
        self.constant("kPrefillColumns", p.prefill.columns);
        self.constant(
            "kWideColumns",
            p.wide.as_ref().map_or(0, |wide| wide.step.columns),
        );
        self.constant("kDecodeColumns", p.decode.columns);
        self.flag("kPrefillRows", p.prefill.transport == Transport::Rows);
        self.flag("kDecodeRows", p.decode.transport == Transport::Rows);
        self.constant("kStepEpochs", step_epochs(p.layers));
        self.constant("kStreamAt", p.exchange.stream_at);
        self.constant("kCandidatesAt", p.exchange.candidates_at);
        self.constant("kSumsAt", p.exchange.sums_at);
        self.constant("kSamplesAt", p.exchange.samples_at);
        self.constant("kBarrierAt", p.exchange.barrier_at);
        self.constant("kHistogramsAt", p.exchange.histograms_at);
        line!(self);
        line!(self, "  template <class R>");
        line!(
            self,
            "  MIRAGE_DEVICE static bool stream_layer(RingWriter<R>& ring, const uint8_t*& source, int group, int member) {{"
        );
        for (i, linear) in p.linears.iter().enumerate() {
            let name = node_type(&linear.name);
            let (lead, end) = (
                if i == 0 { "return " } else { "       " },
                if i + 1 == p.linears.len() { ";" } else { " &&" },
            );
            line!(
                self,
                "    {lead}stream_linear<{name}>(ring, source, slice_of<{name}, Mesh>(group, member)){end}"
            );
        }
        line!(self, "  }}");
        self.layers("prefill", &p.prefill);
        if let Some(wide) = &p.wide {
            self.layers("wide", &wide.step);
        }
        self.layers("decode", &p.decode);
        line!(self, "}};");
    }
}

/// Names of the graph in a comment: no line breaks, no line continuation, nothing but printable ASCII.
fn comment(names: &[String]) -> String {
    names
        .join(", ")
        .chars()
        .filter(|c| c.is_ascii_graphic() && *c != '\\' || *c == ' ')
        .collect()
}
