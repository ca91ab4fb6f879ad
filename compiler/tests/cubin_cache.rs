//! The cubin cache over the real NVRTC: what hits, what misses, and what heals.

use std::fs;
use std::time::Instant;

use mirage_compiler::arch::Arch;
use mirage_compiler::cubin_cache::CubinCache;
use mirage_compiler::nvrtc::{Nvrtc, NvrtcError, Options, Source};

fn source() -> Source {
    Source {
        name: "kernel.cu".to_owned(),
        text: "#include \"one.cuh\"\nextern \"C\" __global__ void k(int* p) { *p = ONE; }\n"
            .to_owned(),
        headers: vec![("one.cuh".to_owned(), "#define ONE 1\n".to_owned())],
    }
}

#[test]
fn a_hit_is_the_same_program_and_fast() {
    let folder = tempfile::tempdir().unwrap();
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let cache = CubinCache::at(folder.path().join("cubins")).unwrap();
    let fetch = || {
        cache
            .compile(&nvrtc, &source(), Arch::Sm90a, &Options::default())
            .unwrap()
    };
    let cold = fetch();
    assert!(!cold.hit);
    assert_eq!(cold.not_kept, None);
    let start = Instant::now();
    let warm = fetch();
    assert!(
        start.elapsed().as_millis() < 50,
        "a hit took {:?}",
        start.elapsed()
    );
    assert!(warm.hit);
    assert_eq!(warm.compiled, cold.compiled);
}

#[test]
fn whatever_changes_the_program_misses() {
    let folder = tempfile::tempdir().unwrap();
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let cache = CubinCache::at(folder.path().join("cubins")).unwrap();
    let fetch = |source: &Source, arch, options: &Options| {
        cache.compile(&nvrtc, source, arch, options).unwrap()
    };
    let plain = Options::default();
    let first = fetch(&source(), Arch::Sm90a, &plain);
    let mut header = source();
    header.headers[0].1 = "#define ONE 11\n".to_owned();
    let mut text = source();
    text.text.push('\n');
    let lines = Options {
        line_info: true,
        ..Options::default()
    };
    let changed = [
        fetch(&header, Arch::Sm90a, &plain),
        fetch(&text, Arch::Sm90a, &plain),
        fetch(&source(), Arch::Sm80, &plain),
        fetch(&source(), Arch::Sm90a, &lines),
    ];
    assert!(changed.iter().all(|fetched| !fetched.hit));
    assert_ne!(changed[0].compiled.cubin, first.compiled.cubin);
    assert!(fetch(&source(), Arch::Sm90a, &plain).hit);
}

#[test]
fn a_damaged_entry_is_compiled_again() {
    let folder = tempfile::tempdir().unwrap();
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let cache = CubinCache::at(folder.path().join("cubins")).unwrap();
    let fetch = || {
        cache
            .compile(&nvrtc, &source(), Arch::Sm90a, &Options::default())
            .unwrap()
    };
    let good = fetch();
    let entries: Vec<_> = fs::read_dir(folder.path().join("cubins"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let [entry] = &entries[..] else {
        panic!("one entry and no temporary files, not {entries:?}")
    };
    let mut bytes = fs::read(entry).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(entry, bytes).unwrap();
    let mended = fetch();
    assert!(!mended.hit);
    assert_eq!(mended.compiled, good.compiled);
    assert!(fetch().hit);
}

#[test]
fn trouble_with_the_disk_costs_only_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let cache = CubinCache::at(folder.path().join("cubins")).unwrap();
    fs::remove_dir(folder.path().join("cubins")).unwrap();
    let fetched = cache
        .compile(&nvrtc, &source(), Arch::Sm90a, &Options::default())
        .unwrap();
    assert!(!fetched.hit);
    assert!(fetched.not_kept.unwrap().contains("was not written"));
}

#[test]
fn an_error_of_the_source_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    let cache = CubinCache::at(folder.path().join("cubins")).unwrap();
    let mut broken = source();
    broken.headers.clear();
    for _ in 0..2 {
        let error = cache
            .compile(&nvrtc, &broken, Arch::Sm90a, &Options::default())
            .unwrap_err();
        assert!(matches!(error, NvrtcError::Compile { .. }), "{error}");
    }
    assert_eq!(
        fs::read_dir(folder.path().join("cubins")).unwrap().count(),
        0
    );
}
