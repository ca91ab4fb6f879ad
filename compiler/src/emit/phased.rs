//! The same program as a chain of kernels, one for each hand-over between CTAs: what a persistent kernel is compared with.
//!
//! Owns where the chain is cut and the text of its kernels; the phases' text is the persistent kernel's.

use std::fmt::Write;
use std::ops::Range;

use super::{CudaSource, Emitter, headers_for};
use crate::arch::Arch;
use crate::program::{CHUNK, CONSUMER_WARPS, Linear, Next, Phase, Program, Step, VALUES_PER_WORD};

const HEADER: &str = "phased.cuh";
const HEADER_TEXT: &str = include_str!("../../device/phased.cuh");

/// The chain's CUDA source, and what runs in which order. Every kernel takes the same parameter (`device/phased.cuh`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhasedSource {
    /// The source.
    pub source: CudaSource,
    /// Kernels of a layer of a prefill step, in order; the layer is a parameter.
    pub prefill: Vec<String>,
    /// Kernels of a layer of a decode step.
    pub decode: Vec<String>,
    /// What a CTA keeps of the residual stream between kernels, in f32 values.
    pub saved_floats: usize,
}

impl PhasedSource {
    /// Before everything else, by all CTAs.
    pub const BEGIN: &str = "mirage_begin";
    /// After the layers of a prefill step, by one CTA; after those of the last one come the head and what follows it.
    pub const END_PREFILL: &str = "mirage_end_prefill";
    /// After the layers of the last prefill step, by all CTAs: the logits.
    pub const PREFILL_HEAD: &str = "mirage_prefill_head";
    /// After the layers of a decode step, by all CTAs: the logits.
    pub const HEAD: &str = "mirage_head";
    /// After the head, by all CTAs: the tokens.
    pub const CHOOSE: &str = "mirage_choose";
    /// At the end of a decode step, by one CTA.
    pub const END_DECODE: &str = "mirage_end_decode";
}

/// Emits the chain of kernels of a program for an architecture.
pub fn phased_source(program: &Program, arch: Arch) -> PhasedSource {
    let mut emitter = Emitter {
        program,
        out: String::new(),
    };
    let saved_floats = saved_floats(program);
    emitter.head_of_file(HEADER, "a kernel for each hand-over between CTAs");
    let mut kernels = Vec::new();
    let prefill = emitter.chain("prefill", &program.prefill, saved_floats, &mut kernels);
    let decode = emitter.chain("decode", &program.decode, saved_floats, &mut kernels);
    emitter.head_kernel(true, saved_floats, &mut kernels);
    emitter.head_kernel(false, saved_floats, &mut kernels);
    emitter.end_namespace();
    for (name, call) in &kernels {
        emitter.entry(name, call);
    }
    for (name, call) in [
        (PhasedSource::BEGIN, "begin_generation<mirage::Model>"),
        (PhasedSource::END_PREFILL, "end_prefill_step<mirage::Model>"),
        (PhasedSource::CHOOSE, "choose_tokens<mirage::Model>"),
        (PhasedSource::END_DECODE, "end_decode_step<mirage::Model>"),
    ] {
        emitter.entry(name, call);
    }
    let mut headers = headers_for(arch);
    headers.push((HEADER.to_owned(), HEADER_TEXT.to_owned()));
    PhasedSource {
        source: CudaSource {
            text: emitter.out,
            headers,
        },
        prefill,
        decode,
        saved_floats,
    }
}

/// Values of the stream that a CTA keeps: all that the persistent kernel has in shared memory, or a word or chunk of every thread.
fn saved_floats(program: &Program) -> usize {
    let regions = &program.shared.regions;
    let kept = regions.iter().find(|region| region.name == "Stream");
    kept.map_or(0, |region| region.bytes / 4)
        .max(CHUNK.max(VALUES_PER_WORD) * CONSUMER_WARPS * 32)
}

/// Where a layer's chain is cut: after each phase whose words another CTA waits for. What follows the last of them
/// prepares the next layer, or the head: it goes to the kernel after it.
fn links(step: &Step) -> (Vec<Range<usize>>, Range<usize>) {
    let mut links = Vec::new();
    let mut begin = 0;
    for (index, phase) in step.layer.iter().enumerate() {
        match phase {
            Phase::Linear(_) | Phase::Attention { .. } | Phase::ReduceScatter { .. } => {
                links.push(begin..index + 1);
                begin = index + 1;
            }
            Phase::Collect { .. }
            | Phase::CollectHeads { .. }
            | Phase::AddToStream { .. }
            | Phase::GatherStream { .. } => {}
        }
    }
    (links, begin..step.layer.len())
}

/// Whether a phase changes the residual stream.
fn changes_stream(phase: &Phase) -> bool {
    match phase {
        Phase::AddToStream { .. } | Phase::ReduceScatter { .. } => true,
        Phase::Linear(_)
        | Phase::Attention { .. }
        | Phase::Collect { .. }
        | Phase::CollectHeads { .. }
        | Phase::GatherStream { .. } => false,
    }
}

impl Emitter<'_> {
    /// The kernels of a layer; returns their names.
    fn chain(
        &mut self,
        name: &str,
        step: &Step,
        saved_floats: usize,
        kernels: &mut Vec<(String, String)>,
    ) -> Vec<String> {
        let (links, tail) = links(step);
        let mut names = Vec::new();
        for (number, link) in links.iter().enumerate() {
            let kind = format!(
                "{}{number}",
                if name == "prefill" {
                    "Prefill"
                } else {
                    "Decode"
                }
            );
            let phases = &step.layer[link.clone()];
            let before = if number == 0 {
                &step.layer[tail.clone()]
            } else {
                &[]
            };
            self.link(&kind, step, name == "prefill", before, phases, saved_floats);
            let entry = format!("mirage_{name}_{number}");
            kernels.push((
                entry.clone(),
                format!("run_phases<mirage::Model, mirage::{kind}>"),
            ));
            names.push(entry);
        }
        names
    }

    fn link(
        &mut self,
        kind: &str,
        step: &Step,
        prefill: bool,
        before: &[Phase],
        phases: &[Phase],
        saved_floats: usize,
    ) {
        let first = self.linear_name(0);
        let begins_layer = !before.is_empty();
        let described: Vec<String> = before
            .iter()
            .chain(phases)
            .map(|phase| self.program.describe(phase))
            .collect();
        line!(self);
        line!(self, "// {}", super::comment(&described));
        self.kernel_constants(kind, step.columns, prefill, saved_floats);
        let linear = phases.iter().find_map(|phase| match phase {
            Phase::Linear(index) => Some(*index),
            _ => None,
        });
        self.fetch(linear);
        line!(self, "  template <class R>");
        line!(
            self,
            "  MIRAGE_DEVICE static void run(Context<R>& x, const PhasedParams& p, int layer, uint32_t epoch) {{"
        );
        line!(self, "    if (x.at.cta >= Mesh::kWorkers) return;");
        line!(self, "    const uint32_t now = epoch + layer + 1;");
        let (before_changes, changes) = (
            before.iter().any(changes_stream),
            phases.iter().any(changes_stream),
        );
        if begins_layer || changes {
            self.declare_stream("    ", step);
        }
        if begins_layer {
            line!(self, "    if (layer == 0) {{");
            line!(
                self,
                "      embed<{first}>(x, stream, gamma_of<{first}>(x.params, 0));"
            );
            line!(self, "      save_stream<{kind}>(x, stream, p);");
            line!(self, "    }} else {{");
            line!(self, "      const uint32_t now = epoch + layer;");
            line!(
                self,
                "      const bf16* gamma_after = gamma_of<{first}>(x.params, layer);"
            );
            self.changing("      ", kind, before_changes, |emitter| {
                emitter.phases("      ", step, before);
            });
            line!(self, "    }}");
        }
        let prepares_next_layer = |phase: &Phase| matches!(phase, Phase::ReduceScatter { next, .. } if *next == Next::NextLayer);
        if phases.iter().any(prepares_next_layer) {
            line!(self, "    const bf16* gamma_after =");
            line!(
                self,
                "        layer + 1 < Model::kLayers ? gamma_of<{first}>(x.params, layer + 1) : gamma_of<Head>(x.params, 0);"
            );
        }
        self.changing("    ", kind, changes, |emitter| {
            emitter.phases("    ", step, phases);
        });
        line!(self, "  }}");
        line!(self, "}};");
    }

    /// What `inside` writes, between loading and saving the stream if it changes it.
    fn changing(
        &mut self,
        indent: &str,
        kind: &str,
        changes: bool,
        inside: impl FnOnce(&mut Self),
    ) {
        if changes {
            line!(self, "{indent}load_stream<{kind}>(x, stream, p);");
        }
        inside(self);
        if changes {
            line!(self, "{indent}save_stream<{kind}>(x, stream, p);");
        }
    }

    /// What prepares the head's input, and the head.
    fn head_kernel(
        &mut self,
        prefill: bool,
        saved_floats: usize,
        kernels: &mut Vec<(String, String)>,
    ) {
        let (step, kind, entry) = if prefill {
            let entry = PhasedSource::PREFILL_HEAD;
            (&self.program.prefill, "PrefillLogits", entry)
        } else {
            (&self.program.decode, "Logits", PhasedSource::HEAD)
        };
        let (_, tail) = links(step);
        line!(self);
        line!(self, "// the LM head");
        self.kernel_constants(kind, step.columns, prefill, saved_floats);
        line!(self, "  template <class R>");
        line!(
            self,
            "  MIRAGE_DEVICE static void fetch(RingWriter<R>& ring, const Params& params, int cta, int) {{"
        );
        line!(
            self,
            "    const uint8_t* source = params.weights + params.stream_offsets[cta];"
        );
        line!(self, "    if (cta < Mesh::kWorkers) {{");
        line!(
            self,
            "      const int group = cta / Mesh::kMembers, member = cta % Mesh::kMembers;"
        );
        self.skip("      ", "Model::kLayers", self.program.linears.as_slice());
        line!(self, "    }}");
        line!(
            self,
            "    stream_linear<Head>(ring, source, head_slice<Head, Mesh>(cta), Ring::kHeadInFlight);"
        );
        line!(self, "  }}");
        line!(self, "  template <class R>");
        line!(
            self,
            "  MIRAGE_DEVICE static void run(Context<R>& x, const PhasedParams& p, int, uint32_t epoch) {{"
        );
        line!(self, "    const uint32_t now = epoch + Model::kLayers;");
        line!(
            self,
            "    const bf16* gamma_after = gamma_of<Head>(x.params, 0);"
        );
        let others = self.gather_of_others(step, "now");
        if let Some(gather) = &others {
            line!(self, "    if (x.at.cta >= Mesh::kWorkers) {{");
            line!(self, "      {gather}");
            line!(self, "    }} else {{");
        } else {
            line!(self, "    {{");
        }
        self.declare_stream("      ", step);
        if step.layer[tail.clone()].iter().any(changes_stream) {
            line!(self, "      load_stream<{kind}>(x, stream, p);");
        }
        self.phases("      ", step, &step.layer[tail]);
        self.hand_on_to_others("      ", step, "now");
        line!(self, "    }}");
        if prefill {
            line!(self, "    end_prefill<Model, C>(x);");
        }
        line!(
            self,
            "    lm_head<Head, Model::kDecodeColumns, Mesh>(x, candidates_of<Model>(x.params, p.state->parity), false, now + 1);"
        );
        line!(self, "  }}");
        line!(self, "}};");
        kernels.push((
            entry.to_owned(),
            format!("run_phases<mirage::Model, mirage::{kind}>"),
        ));
    }

    fn kernel_constants(&mut self, kind: &str, columns: usize, prefill: bool, saved: usize) {
        line!(self, "struct {kind} {{");
        self.constant("C", columns);
        self.flag("kPrefill", prefill);
        self.constant("kSavedFloats", saved);
    }

    /// The weights of the one linear of a kernel, if it has one.
    fn fetch(&mut self, linear: Option<usize>) {
        line!(self, "  template <class R>");
        let Some(index) = linear else {
            line!(
                self,
                "  MIRAGE_DEVICE static void fetch(RingWriter<R>&, const Params&, int, int) {{}}"
            );
            return;
        };
        let name = self.linear_name(index);
        line!(
            self,
            "  MIRAGE_DEVICE static void fetch(RingWriter<R>& ring, const Params& params, int cta, int layer) {{"
        );
        line!(self, "    if (cta >= Mesh::kWorkers) return;");
        line!(
            self,
            "    const int group = cta / Mesh::kMembers, member = cta % Mesh::kMembers;"
        );
        line!(
            self,
            "    const uint8_t* source = params.weights + params.stream_offsets[cta];"
        );
        let linears = self.program.linears.as_slice();
        self.skip("    ", "layer", linears);
        self.skip("    ", "1", &linears[..index]);
        line!(
            self,
            "    stream_linear<{name}>(ring, source, slice_of<{name}, Mesh>(group, member));"
        );
        line!(self, "  }}");
    }

    /// Moves `source` past these linears, so many times.
    fn skip(&mut self, indent: &str, times: &str, linears: &[Linear]) {
        for linear in linears {
            let name = super::node_type(&linear.name);
            line!(
                self,
                "{indent}source += {times} * bytes_of(slice_of<{name}, Mesh>(group, member));"
            );
        }
    }

    /// Phases as the persistent kernel has them, indented like what is around them here.
    fn phases(&mut self, indent: &str, step: &Step, phases: &[Phase]) {
        let begin = self.out.len();
        for phase in phases {
            match phase {
                Phase::Attention { exchange, next } if step.replicate_below > 0 => {
                    self.attention_phase(step, exchange, *next, ", Contexts::kPublished");
                }
                // What attention keeps in shared memory does not outlast its kernel.
                Phase::CollectHeads { .. } if step.replicate_below > 0 => {
                    for phase in &step.layer {
                        if let Phase::Attention { exchange, next } = phase {
                            self.attention_phase(step, exchange, *next, ", Contexts::kReplicated");
                        }
                    }
                    self.phase(step, phase);
                }
                _ => self.phase(step, phase),
            }
        }
        let text = self.out.split_off(begin);
        for text in text.lines() {
            line!(self, "{indent}{}", text.trim_start());
        }
    }

    fn entry(&mut self, name: &str, call: &str) {
        line!(self);
        line!(
            self,
            "extern \"C\" __global__ void __launch_bounds__(mirage::kThreads, 1)"
        );
        line!(
            self,
            "    {name}(const __grid_constant__ mirage::PhasedParams p) {{"
        );
        line!(self, "  mirage::{call}(p);");
        line!(self, "}}");
    }
}
