//! `mirage-compile` as a user meets it: the real binary, good input and bad.

use std::fs;
use std::process::{Command, Stdio};

use tempfile::TempDir;

const QWEN3: &str = include_str!("../../graphs/qwen3.ron");

/// The parts of a config.json that the graph needs; `layers` is what tests change.
fn config(layers: &str) -> String {
    format!(
        r#"{{"model_type": "qwen3", "hidden_act": "silu", "num_hidden_layers": {layers}, "hidden_size": 64,
            "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": true}}"#
    )
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs in a folder that holds `qwen3.ron` and these files.
fn run(folder: &TempDir, files: &[(&str, &[u8])], args: &[&str]) -> Run {
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    put("qwen3.ron", QWEN3.as_bytes());
    for (name, bytes) in files {
        put(name, bytes);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mirage-compile"))
        .args(args)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let run = Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

/// An error with this exit code that says all of `expect`; nothing on stdout, nothing written.
#[track_caller]
fn check_error(files: &[(&str, &[u8])], args: &[&str], code: i32, expect: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let run = run(&folder, files, args);
    assert_eq!(run.code, Some(code), "{}", run.stderr);
    assert_eq!(run.stdout, "");
    assert!(!folder.path().join("out").exists());
    assert!(run.stderr.starts_with("error"), "{}", run.stderr);
    for part in expect {
        assert!(
            run.stderr.contains(part),
            "{part:?} is not in: {}",
            run.stderr
        );
    }
}

/// The graph with one change, as `g.ron`.
#[track_caller]
fn check_graph(from: &str, to: &str, expect: &[&str]) {
    assert!(
        QWEN3.contains(from),
        "{from:?} is not in qwen3.ron any more"
    );
    let graph = QWEN3.replacen(from, to, 1);
    check_error(&[("g.ron", graph.as_bytes())], &["g.ron"], 1, expect);
}

#[test]
fn a_good_graph_is_compiled() {
    let folder = tempfile::tempdir().unwrap();
    let done = run(&folder, &[], &["qwen3.ron"]);
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    assert!(
        done.stdout
            .contains("qwen3, 28 layers, 0.60 B parameters, the sizes in qwen3.ron"),
        "{}",
        done.stdout
    );
    assert!(
        done.stdout
            .contains("sm_90a (H100 SXM, 132 SMs), batch 1, up to 4096 tokens"),
        "{}",
        done.stdout
    );
    assert!(
        fs::read_to_string(folder.path().join("out/qwen3/fused.txt"))
            .unwrap()
            .starts_with("fused graph qwen3")
    );
}

#[test]
fn a_checkpoint_gives_the_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "qwen3.ron",
        "--model",
        "m",
        "--arch",
        "sm_80",
        "--batch",
        "8",
        "--max-seq",
        "512",
        "-o",
        "deep/er",
    ];
    let done = run(&folder, &[("m/config.json", config("3").as_bytes())], &args);
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    assert!(done.stdout.contains("qwen3, 3 layers"), "{}", done.stdout);
    assert!(
        done.stdout
            .contains("sm_80 (A100 SXM 80GB, 108 SMs), batch 8, up to 512 tokens"),
        "{}",
        done.stdout
    );
    assert!(folder.path().join("deep/er/fused.txt").is_file());
}

#[test]
fn help_and_version_teach() {
    let folder = tempfile::tempdir().unwrap();
    let help = run(&folder, &[], &["--help"]);
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
    assert_eq!(run(&folder, &[], &["--version"]).code, Some(0));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("qwen3.ron"), QWEN3).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_mirage-compile"))
        .arg("qwen3.ron")
        .current_dir(folder.path())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

#[test]
fn graphs_that_are_wrong() {
    check_graph(
        "name: \"qwen3\",",
        "name: \"qwen3\"",
        &["g.ron:16:5", "a comma follows every entry"],
    );
    check_graph("Silu(", "Sillu(", &["Sillu", "Silu", "g.ron:"]);
    check_graph(
        "q_rope\": Rope(input: \"q_norm\"",
        "q_rope\": Rope(input: \"q_nrom\"",
        &["q_nrom", "q_norm"],
    );
    check_graph(
        "Linear(input: \"attention_norm\"",
        "Linear(input: \"attention_residual\"",
        &["cycle", "g.ron:"],
    );
    check_graph(
        "kv_heads\": (keys: [\"num_key_value_heads\"], default: 8",
        "kv_heads\": (keys: [\"num_key_value_heads\"], default: 5",
        &["g.ron:"],
    );
    check_graph(
        "\"layers\": (keys: [\"num_hidden_layers\"], default: 28)",
        "\"layers\": (keys: [\"num_hidden_layers\"], default: 0)",
        &["g.ron:"],
    );
    check_error(&[("g.ron", b"")], &["g.ron"], 1, &["g.ron"]);
    check_error(
        &[("g.ron", b"\xff\xfe(")],
        &["g.ron"],
        1,
        &["g.ron cannot be read: it is not UTF-8 text (byte 0 is not)"],
    );
    check_error(
        &[("g.ron", "(".repeat(100_000).as_bytes())],
        &["g.ron"],
        1,
        &["g.ron"],
    );
}

#[test]
fn checkpoints_that_are_wrong() {
    let check = |text: &str, expect: &[&str]| {
        check_error(
            &[("m/config.json", text.as_bytes())],
            &["qwen3.ron", "--model", "m"],
            1,
            expect,
        );
    };
    check(&config("0"), &["layers", "0", "config.json"]);
    check(
        &config("1000000000000"),
        &["layers", "1000000000000", "config.json"],
    );
    check(&config("-1"), &["layers", "-1"]);
    check(&config("\"many\""), &["layers", "many"]);
    check(
        &config("3").replace("\"qwen3\"", "\"llama\""),
        &["llama", "qwen3"],
    );
    check(
        &config("3").replace("\"vocab_size\": 512,", ""),
        &["vocab_size"],
    );
    check(&config("3")[..40], &["config.json", "not valid JSON"]);
    check("[]", &["config.json", "not a JSON object"]);
    check_error(
        &[],
        &["qwen3.ron", "--model", "none"],
        1,
        &[
            "none/config.json cannot be read: No such file",
            "--model takes",
        ],
    );
    check_error(
        &[],
        &["qwen3.ron", "--model", "qwen3.ron"],
        1,
        &["qwen3.ron/config.json cannot be read: Not a directory"],
    );
}

#[test]
fn command_lines_that_are_wrong() {
    let check = |args: &[&str], expect: &[&str]| check_error(&[], args, 2, expect);
    check(&[], &["GRAPH"]);
    check(
        &["qwen3.ron", "--arch", "sm_90"],
        &["did you mean \"sm_90a\"?", "known: sm_80, "],
    );
    check(&["qwen3.ron", "--batch", "17"], &["17", "1..=16"]);
    check(&["qwen3.ron", "--batch", "0"], &["0", "1..=16"]);
    check(&["qwen3.ron", "--max-seq", "many"], &["many", "--max-seq"]);
    check(&["qwen3.ron", "--modle", "m"], &["--modle", "--model"]);
}

#[test]
fn files_that_are_not_there_or_not_ours() {
    check_error(
        &[],
        &["qwen.ron"],
        1,
        &[
            "qwen.ron cannot be read: No such file",
            "there is qwen3.ron",
        ],
    );
    check_error(
        &[],
        &["."],
        1,
        &[
            "the graph . cannot be read: Is a directory",
            "there is qwen3.ron",
        ],
    );
    check_error(
        &[],
        &["nowhere/g.ron"],
        1,
        &["nowhere/g.ron cannot be read"],
    );
    check_error(
        &[("f", b"")],
        &["qwen3.ron", "-o", "f"],
        1,
        &["f cannot be written: File exists", "-o takes a folder"],
    );
    check_error(
        &[("f", b"")],
        &["qwen3.ron", "-o", "f/out"],
        1,
        &["f/out cannot be written: Not a directory"],
    );
    // Nobody can make folders in /proc, not even root.
    check_error(
        &[],
        &["qwen3.ron", "-o", "/proc/out"],
        1,
        &["/proc/out cannot be written"],
    );
}
