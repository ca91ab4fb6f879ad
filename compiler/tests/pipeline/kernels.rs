//! Real cubins of the emitted kernels by the real NVRTC; needs no GPU. Where NVRTC is missing these tests fail and say what
//! to install.
//!
//! NVRTC compiles one program at a time in a process, so there is nothing to gain from threads here.

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::calibration;
use mirage_compiler::emit::{
    CudaSource, ENTRY, PhasedSource, REPACK_ENTRY, cuda_source, phased_source,
};
use mirage_compiler::nvrtc::{Nvrtc, Options, Source};

use crate::models::compile;

/// Kernels compile without a warning, and keep everything in registers.
#[track_caller]
fn compile_clean(what: &str, cuda: CudaSource, arch: Arch) -> Vec<String> {
    let source = Source {
        name: "kernel.cu".to_owned(),
        text: cuda.text,
        headers: cuda.headers,
    };
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let compiled = nvrtc
        .compile(&source, arch, &Options::default())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(&compiled.cubin[..4], b"\x7fELF", "{what}");
    assert_eq!(compiled.log, "", "{what}");
    let mut names = Vec::new();
    for kernel in compiled.resources {
        assert_eq!(
            (
                kernel.spill_store_bytes,
                kernel.spill_load_bytes,
                kernel.stack_bytes
            ),
            (0, 0, 0),
            "{what}: spills (stores, loads) and stack: {kernel:?}"
        );
        names.push(kernel.name);
    }
    names.sort();
    names
}

/// What a cubin holds, by name: the kernel, and the one that loads its weights.
const ENTRIES: [&str; 2] = [ENTRY, REPACK_ENTRY];

#[track_caller]
fn check(model: &str, arch: Arch, batch: usize) {
    let what = format!("{model}, {arch}, batch {batch}");
    let (_, program) = compile(model, arch, batch);
    let names = compile_clean(&what, cuda_source(&program, arch), arch);
    assert_eq!(names, ENTRIES, "{what}");
}

/// The chain of kernels that the benchmark compares with.
#[track_caller]
fn check_phased(model: &str, arch: Arch, batch: usize) {
    let what = format!("{model}, {arch}, batch {batch}, phased");
    let (_, program) = compile(model, arch, batch);
    let phased = phased_source(&program, arch);
    let names = compile_clean(&what, phased.source, arch);
    let others = [
        PhasedSource::BEGIN,
        PhasedSource::END_PREFILL,
        PhasedSource::PREFILL_HEAD,
        PhasedSource::HEAD,
        PhasedSource::CHOOSE,
        PhasedSource::END_DECODE,
    ];
    let mut expect: Vec<String> = others.map(str::to_owned).to_vec();
    expect.extend(phased.prefill);
    expect.extend(phased.decode);
    expect.sort();
    assert_eq!(names, expect, "{what}");
}

#[test]
fn phased_kernels_compile() {
    check_phased("0.6B", Arch::Sm90a, 1);
    check_phased("0.6B", Arch::Sm90a, 8);
    check_phased("tiny", Arch::Sm80, 1);
}

#[test]
fn the_default_kernel_compiles_for_ampere() {
    check("0.6B", Arch::Sm80, 1);
}

#[test]
fn the_default_kernel_compiles_for_hopper() {
    check("0.6B", Arch::Sm90a, 1);
}

#[test]
fn the_default_kernel_compiles_for_blackwell() {
    check("0.6B", Arch::Sm100a, 1);
}

#[test]
fn the_default_kernel_compiles_for_geforce_blackwell() {
    check("0.6B", Arch::Sm120a, 1);
}

#[test]
fn pages_of_ampere_compile_for_hopper() {
    let (_, program) = compile("0.6B", Arch::Sm90a, 1);
    let source = cuda_source(&program, Arch::Sm80);
    assert_eq!(compile_clean("cp.async", source, Arch::Sm90a), ENTRIES);
}

#[test]
fn a_timeline_compiles() {
    let (_, program) = compile("0.6B", Arch::Sm90a, 1);
    let source = cuda_source(&program, Arch::Sm90a).traced();
    assert_eq!(compile_clean("timeline", source, Arch::Sm90a), ENTRIES);
}

#[test]
fn eight_sequences_compile() {
    check("0.6B", Arch::Sm90a, 8);
}

/// A warp of the linears holds the products of 32 and 64 columns.
#[test]
fn many_sequences_compile() {
    check("0.6B", Arch::Sm90a, 32);
    check("0.6B", Arch::Sm90a, 64);
}

#[test]
fn qwen3_8b_compiles() {
    check("8B", Arch::Sm90a, 1);
}

/// Four query heads to a KV head, and a batch at which a CTA has tasks enough to take all four at once.
#[test]
fn many_query_heads_compile() {
    check("4B", Arch::Sm90a, 16);
}

#[test]
fn llama3_compiles() {
    check("llama3", Arch::Sm90a, 1);
}

#[test]
fn the_tiny_model_compiles() {
    check("tiny", Arch::Sm90a, 1);
}

/// What mirage-calibrate runs, on every kind of GPU: rings of 128 KB, and of what a small SM has room for.
#[test]
fn the_calibration_compiles() {
    for arch in [Arch::Sm80, Arch::Sm90a, Arch::Sm120a] {
        let gpu = GpuModel::default_for(arch);
        let source = calibration::source(&gpu);
        let cuda = CudaSource {
            text: source.text,
            headers: source.headers,
        };
        let names = compile_clean(&format!("calibration, {arch}"), cuda, arch);
        assert!(
            names.contains(&calibration::BARRIER.to_owned()),
            "{names:?}"
        );
        assert!(
            names.contains(&calibration::stream_entry(16 << 10, 2)),
            "{names:?}"
        );
    }
}
