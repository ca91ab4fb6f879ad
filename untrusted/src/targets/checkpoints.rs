//! The files of a model's folder.

use std::fs;
use std::path::Path;

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::tokenizer::Tokenizer;

use super::refused;

/// One tensor `w`, f32 `[2]`.
const SHARD: &[u8] = b"\x39\0\0\0\0\0\0\0{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}     \0\0\x80\x3f\0\0\0\x40";

pub(super) fn safetensors(input: &[u8]) -> bool {
    let outer = tempfile::tempdir().expect("a folder");
    let dir = outer.path().join("model");
    let put = |path: &Path, bytes: &[u8]| fs::write(path, bytes).expect("a file");
    fs::create_dir(&dir).expect("a folder");
    put(&dir.join("config.json"), b"{}");
    if input.first() == Some(&b'{') {
        put(&outer.path().join("a.safetensors"), SHARD);
        put(&dir.join("a.safetensors"), SHARD);
        put(&dir.join("model.safetensors.index.json"), input);
    } else {
        put(&dir.join("model.safetensors"), input);
    }
    let checkpoint = match Checkpoint::open(&dir) {
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
