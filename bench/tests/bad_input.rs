//! A model's folder that somebody else made, through the real binary: one row each.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");

/// What is put into the folder in the place of a file that is there.
enum Put<'a> {
    Text(&'a str),
    Bytes(&'a [u8]),
    /// So many zeros, which take no room on disk.
    Zeros(u64),
    /// A link to this path.
    Link(&'a str),
    Pipe,
}

/// The tiny model with one file changed is refused with exit code 1 and these words, within seconds.
fn check(name: &str, put: &Put<'_>, words: &[&str]) {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("m");
    fs::create_dir(&model).expect("a folder");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(Path::new(TINY).join(file), model.join(file)).expect("a copy");
    }
    fs::write(dir.path().join("outside"), "{}").expect("a file");
    if name.ends_with(".index.json") {
        // The shard that is there; and without the single file, the index counts.
        fs::rename(model.join("model.safetensors"), model.join("a.safetensors")).expect("renamed");
    }
    let path = model.join(name);
    let _ = fs::remove_file(&path);
    match put {
        Put::Text(text) => fs::write(&path, text).expect("a file"),
        Put::Bytes(bytes) => fs::write(&path, bytes).expect("a file"),
        Put::Zeros(length) => {
            let file = fs::File::create(&path).expect("a file");
            file.set_len(*length).expect("a length");
        }
        Put::Link(to) => symlink(to, &path).expect("a link"),
        Put::Pipe => {
            let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo");
            assert!(made.success());
        }
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_mirage-bench"))
        .current_dir(dir.path())
        .args("--model m --device cpu --batch-sizes 1 --max-tokens 2".split(' '))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let start = Instant::now();
    while child.try_wait().expect("a state").is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().expect("it runs");
            panic!("{name} makes it hang");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("it has ended");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{name}: {stderr}");
    assert!(
        !stderr.contains("panicked") && stderr.len() < 4096,
        "{stderr}"
    );
    for word in words {
        assert!(stderr.contains(word), "`{word}` is not in: {stderr}");
    }
}

#[test]
fn files_that_are_none() {
    for (name, put, words) in [
        (
            "config.json",
            Put::Pipe,
            ["--model", "no config.json in it"],
        ),
        (
            "model.safetensors",
            Put::Pipe,
            ["m/model.safetensors", "not a regular file"],
        ),
        (
            "tokenizer.json",
            Put::Pipe,
            ["m/tokenizer.json", "not a regular file"],
        ),
        (
            "generation_config.json",
            Put::Pipe,
            ["m/generation_config.json", "not a regular file"],
        ),
        (
            "tokenizer.json",
            Put::Link("/dev/zero"),
            ["m/tokenizer.json", "outside of the model's folder"],
        ),
        (
            "model.safetensors",
            Put::Link("../outside"),
            ["m/model.safetensors", "outside of the model's folder"],
        ),
        (
            "generation_config.json",
            Put::Link("/etc/passwd"),
            ["generation_config.json", "outside of the model's folder"],
        ),
    ] {
        check(name, &put, &words);
    }
}

#[test]
fn files_that_are_too_large() {
    for (name, length) in [
        ("config.json", (4 << 20) + 1),
        ("generation_config.json", 1 << 40),
        ("tokenizer.json", 1 << 40),
        ("model.safetensors.index.json", 1 << 40),
    ] {
        check(name, &Put::Zeros(length), &[name, "larger than"]);
    }
}

#[test]
fn texts_that_are_wrong() {
    let deep = "[".repeat(100_000);
    let shards: Vec<String> = (0..5000)
        .map(|i| format!("\"w{i}\": \"{i}.safetensors\""))
        .collect();
    let shards = format!("{{\"weight_map\": {{{}}}}}", shards.join(","));
    let index = "model.safetensors.index.json";
    for (name, put, words) in [
        (
            "config.json",
            Put::Text(&deep),
            ["config.json", "not the JSON it should be"],
        ),
        (
            "config.json",
            Put::Bytes(b"{\"model_type\": \"\xff\"}"),
            ["config.json", "not the JSON"],
        ),
        (
            "generation_config.json",
            Put::Text("{\"eos_token_id\": -1}"),
            ["eos_token_id is -1", "or a list"],
        ),
        (
            "tokenizer.json",
            Put::Text("{}"),
            ["tokenizer.json", "not a tokenizer"],
        ),
        (
            "tokenizer.json",
            Put::Text(&deep),
            ["tokenizer.json", "recursion limit"],
        ),
        (
            "model.safetensors",
            Put::Bytes(&[0xff; 16]),
            ["18446744073709551615", "download it again"],
        ),
        (
            index,
            Put::Text(&shards),
            ["names 5000 files", "at most 4096"],
        ),
        (
            index,
            Put::Text("{\"weight_map\": {\"w\": \"../outside\"}}"),
            ["../outside", "plain file name"],
        ),
        (
            index,
            Put::Text("{\"weight_map\": {\"w\": \"/etc/passwd\"}}"),
            ["/etc/passwd", "plain file name"],
        ),
        (
            index,
            Put::Text("{\"weight_map\": {\"w\": \"./a.safetensors\"}}"),
            ["./a.safetensors", "plain file name"],
        ),
        (
            index,
            Put::Text("{\"weight_map\": {\"w\": \"b.safetensors\"}}"),
            ["shard b.safetensors is not there", "1 tensor(s)"],
        ),
        (
            index,
            Put::Text(&deep),
            [index, "not the JSON it should be"],
        ),
    ] {
        check(name, &put, &words);
    }
}
