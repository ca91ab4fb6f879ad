//! Good input: what is written, and what is said about it.

use std::fs;
use std::process::Stdio;

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::artifact::Artifact;
use mirage_compiler::driver;
use mirage_compiler::plan::Target;
use mirage_compiler::typed::ModelConfig;

use crate::{Nvrtc, QWEN3, command, config, run};

/// The embedded model's.
const TINY: &str = include_str!("../../../models/tiny/config.json");

#[test]
fn the_kernel_can_be_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let files: &[(&str, &[u8])] = &[("m/config.json", TINY.as_bytes())];
    let args = ["qwen3.ron", "--model", "m"];
    let done = run(&folder, files, &args, Nvrtc::Here);
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    for part in [
        "\nkernel    ",
        " registers, ",
        "; cubin ",
        "out/qwen3/kernel.cubin\n",
    ] {
        assert!(
            done.stdout.contains(part),
            "{part:?} is not in: {}",
            done.stdout
        );
    }
    let out = folder.path().join("out/qwen3");
    let manifest = fs::read_to_string(out.join("manifest.json")).unwrap();
    let cubin = fs::read(out.join("kernel.cubin")).unwrap();
    let artifact = Artifact::load(&manifest, cubin).unwrap();
    let target = Target {
        gpu: GpuModel::default_for(Arch::Sm90a),
        batch: 1,
        max_seq: 4096,
    };
    let config = ModelConfig::parse(TINY, "config.json").unwrap();
    let compiled = driver::compile(QWEN3, "qwen3.ron", &config, &target).unwrap();
    assert_eq!(artifact.manifest.program, compiled.program);

    let again = run(&folder, files, &args, Nvrtc::Here);
    assert!(
        again.stdout.contains("; cubin from the cache "),
        "{}",
        again.stdout
    );

    // A reader that goes away is no error.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command(folder.path(), files, &args, Nvrtc::Here)
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*said), (Some(0), ""));
}

#[test]
fn without_nvrtc_the_source_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let old: &[(&str, &[u8])] = &[("o/manifest.json", b"old"), ("o/kernel.cubin", b"old")];
    let done = run(&folder, old, &["qwen3.ron", "-o", "o"], Nvrtc::Missing);
    assert_eq!(done.code, Some(3), "{}", done.stderr);
    let expect = [
        "error: MIRAGE_NVRTC=",
        "holds no libnvrtc.so.13",
        "set it to",
    ];
    for part in expect {
        assert!(
            done.stderr.contains(part),
            "{part:?} is not in: {}",
            done.stderr
        );
    }
    assert!(
        done.stdout.contains("kernel    no cubin; "),
        "{}",
        done.stdout
    );

    // The source stands on its own: whatever a file includes is there.
    let out = folder.path().join("o");
    let mut left: Vec<String> = vec!["kernel.cu".to_owned()];
    let mut seen = Vec::new();
    while let Some(name) = left.pop() {
        let text = fs::read_to_string(out.join(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let includes = text
            .lines()
            .filter_map(|line| line.strip_prefix("#include "));
        let names = includes.map(|name| name.trim_matches('"').to_owned());
        left.extend(names.filter(|name| !seen.contains(name)));
        seen.push(name);
    }
    assert!(seen.len() > 10, "{seen:?}");
    // A manifest stands for a complete folder.
    for gone in ["manifest.json", "kernel.cubin"] {
        assert!(!out.join(gone).exists(), "{gone} is of an older source");
    }
    for (stage, begins) in [
        ("fused", "fused graph qwen3"),
        ("plan", "mesh: "),
        ("program", "program qwen3"),
    ] {
        let text = fs::read_to_string(out.join(format!("{stage}.txt"))).unwrap();
        assert!(text.starts_with(begins), "{text}");
    }
}

/// The summary without the numbers that a better plan or a faster machine changes.
#[track_caller]
fn check_summary(name: &str, config: &str, args: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let files: &[(&str, &[u8])] = &[("m/config.json", config.as_bytes())];
    let done = run(&folder, files, args, Nvrtc::Missing);
    assert_eq!(done.code, Some(3), "{}", done.stderr);
    let fixed = ["model ", "target ", "layer "];
    let lines = done.stdout.lines().map(|line| {
        if fixed.iter().any(|label| line.starts_with(label)) {
            return line.to_owned();
        }
        let mut blurred = String::new();
        let mut before = ' ';
        for c in line.chars() {
            match c {
                '0'..='9' | '.' if before == '#' => continue,
                '0'..='9' if !before.is_alphanumeric() => before = '#',
                _ => before = c,
            }
            blurred.push(before);
        }
        blurred
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../../snapshots/cli");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn summaries_are_for_people() {
    check_summary("qwen3_0_6b", "", &["qwen3.ron"]);
    let args = [
        "qwen3.ron",
        "--model",
        "m",
        "--arch",
        "sm_80",
        "--batch",
        "8",
    ];
    check_summary(
        "qwen3_tiny_a100_b8",
        TINY,
        &[&args[..], &["--max-seq", "512"]].concat(),
    );
    let llama = config(&[
        ("model_type", "\"llama\""),
        ("tie_word_embeddings", "false"),
        ("vocab_size", "4096"),
    ]);
    let args = ["llama3.ron", "--model", "m", "-o", "deep/er"];
    check_summary("llama3_small", &llama, &args);
}

#[test]
fn help_and_version_teach() {
    let folder = tempfile::tempdir().unwrap();
    let help = run(&folder, &[], &["--help"], Nvrtc::Missing);
    assert_eq!(help.code, Some(0));
    for part in [
        "graphs/qwen3.ron",
        "--model",
        "--arch",
        "--batch",
        "--max-seq",
        "--out",
        "Exit codes:",
        "MIRAGE_NVRTC",
    ] {
        assert!(
            help.stdout.contains(part),
            "{part:?} is not in: {}",
            help.stdout
        );
    }
    let version = run(&folder, &[], &["--version"], Nvrtc::Missing);
    assert_eq!(version.code, Some(0));
}
