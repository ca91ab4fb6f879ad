//! The files of a model's folder.

use std::fs;
use std::path::Path;

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::tokenizer::Tokenizer;
use tempfile::TempDir;

use super::refused;

/// One tensor `w`, f32 `[2]`.
const SHARD: &[u8] = b"\x38\0\0\0\0\0\0\0{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}  \0\0\x80\x3f\0\0\0\x40";

pub(super) fn safetensors(input: &[u8]) -> bool {
    if input.first() == Some(&b'{') {
        return open("model.safetensors.index.json", input);
    }
    // Most changes of a header change its length: with the right one the header itself is tried, too.
    if let Some((length, rest)) = input.split_first_chunk::<8>()
        && let Some(last) = rest.iter().rposition(|byte| *byte == b'}')
    {
        let right = (last as u64 + 1).to_le_bytes();
        if *length != right {
            open("model.safetensors", &[&right[..], rest].concat());
        }
    }
    open("model.safetensors", input)
}

/// A model's folder in a folder that has a shard too, made once for each thread: making one takes longer than reading it.
fn outer() -> TempDir {
    let outer = tempfile::tempdir().expect("a folder");
    let dir = outer.path().join("model");
    fs::create_dir(&dir).expect("a folder");
    fs::write(dir.join("config.json"), b"{}").expect("a file");
    for folder in [outer.path(), &dir] {
        fs::write(folder.join("a.safetensors"), SHARD).expect("a file");
    }
    outer
}

/// Opens and reads a checkpoint with this file.
fn open(name: &str, input: &[u8]) -> bool {
    thread_local! {
        static OUTER: TempDir = outer();
    }
    let dir = OUTER.with(|outer| outer.path().join("model"));
    let file = dir.join(name);
    fs::write(&file, input).expect("a file");
    let taken = read_checkpoint(&dir);
    fs::remove_file(file).expect("it was written");
    taken
}

fn read_checkpoint(dir: &Path) -> bool {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            refused(&error);
            return false;
        }
    };
    let home = dir.canonicalize().expect("it is there");
    for file in checkpoint.files() {
        let file = file.canonicalize().expect("it was opened");
        assert!(file.starts_with(&home), "{} was read", file.display());
    }
    checkpoint.fingerprint();
    for name in checkpoint.names() {
        read_ends(&checkpoint, name);
    }
    if let Err(error) = checkpoint.tensor("model.embed_tokens.weight") {
        refused(&error);
    }
    true
}

/// The first and the last element, and none beyond.
fn read_ends(checkpoint: &Checkpoint, name: &str) {
    let tensor = match checkpoint.tensor(name) {
        Ok(tensor) => tensor,
        Err(error) => return refused(&error),
    };
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let mut element = [0.0];
    if rows > 0 && columns > 0 {
        for (row, column) in [(0, 0), (rows - 1, columns - 1)] {
            tensor
                .read_f32(row, column, &mut element)
                .expect("an element of the tensor");
        }
    }
    for (row, column) in [(rows, 0), (0, columns), (usize::MAX, usize::MAX)] {
        assert!(tensor.read_f32(row, column, &mut element).is_err());
    }
}

pub(super) fn tokenizer(input: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("tokenizer.json"), input).expect("a file");
    let tokenizer = match Tokenizer::open(dir.path()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            refused(&error);
            return false;
        }
    };
    match tokenizer.encode("Once, in <|im_end|> the\n\u{1f600}") {
        Ok(tokens) => {
            if let Err(error) = tokenizer.decode(&tokens) {
                refused(&error);
            }
        }
        Err(error) => refused(&error),
    }
    true
}
