//! `mirage-compile` as a user meets it: the real binary, good input and bad.

mod bad;
mod good;

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const QWEN3: &str = include_str!("../../../graphs/qwen3.ron");
const LLAMA3: &str = include_str!("../../../graphs/llama3.ron");

/// A config.json with the keys that the graph needs, for a small Qwen3 with these changes.
fn config(changes: &[(&str, &str)]) -> String {
    let mut keys = vec![
        ("model_type", "\"qwen3\""),
        ("hidden_act", "\"silu\""),
        ("num_hidden_layers", "3"),
        ("hidden_size", "256"),
        ("intermediate_size", "768"),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", "2"),
        ("head_dim", "64"),
        ("vocab_size", "512"),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", "10000"),
        ("tie_word_embeddings", "true"),
    ];
    for &(key, value) in changes {
        keys.retain(|(known, _)| *known != key);
        keys.push((key, value));
    }
    let keys = keys
        .iter()
        .map(|(key, value)| format!("\"{key}\": {value}"));
    format!("{{{}}}", keys.collect::<Vec<_>>().join(", "))
}

/// Which NVRTC a run finds.
#[derive(Clone, Copy)]
enum Nvrtc {
    /// That of this machine; cubins are kept from run to run of the tests.
    Here,
    /// None: what is tested ends before it, or is what happens then.
    Missing,
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The binary, about to run in a folder that holds `qwen3.ron`, `llama3.ron` and these files.
fn command(folder: &Path, files: &[(&str, &[u8])], args: &[&str], nvrtc: Nvrtc) -> Command {
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    put("qwen3.ron", QWEN3.as_bytes());
    put("llama3.ron", LLAMA3.as_bytes());
    for (name, bytes) in files {
        put(name, bytes);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_mirage-compile"));
    command.args(args).current_dir(folder).env(
        "MIRAGE_CACHE_DIR",
        concat!(env!("CARGO_TARGET_TMPDIR"), "/cli"),
    );
    if let Nvrtc::Missing = nvrtc {
        command.env("MIRAGE_NVRTC", folder);
    }
    command
}

fn run(folder: &TempDir, files: &[(&str, &[u8])], args: &[&str], nvrtc: Nvrtc) -> Run {
    let output = command(folder.path(), files, args, nvrtc).output().unwrap();
    let run = Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    // Neither is a terminal.
    assert!(!run.stdout.contains('\x1b') && !run.stderr.contains('\x1b'));
    run
}
