//! Checkpoints in Hugging Face layout: a folder with `config.json` and safetensors weights.
//!
//! Owns finding, mapping and validating the files, and reading numbers out of them. Opening reads headers only; weights
//! stay in the file, memory-mapped, until somebody reads them. It must not know a model: which tensors there should be,
//! and of which shape, is the caller's business ([`Tensor::expect_shape`]).
//!
//! What counts as a checkpoint, in this order:
//! 1. `model.safetensors`;
//! 2. `model.safetensors.index.json`, whose `weight_map` names the file of every tensor. The index is authoritative: a
//!    tensor that a shard holds but the index does not list is not part of the checkpoint.
//!
//! Shard names are relative paths below the folder. `..` and absolute paths are refused, and so are symbolic links that lead
//! out of it (`folder.rs`).

mod error;
mod file;
pub(crate) mod folder;
mod tensor;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Component, Path, PathBuf};

use mirage_compiler::input::MAX_TEXT;
use mirage_compiler::reference::{self, WeightSource};
use serde::Deserialize;
use serde_json::{Map, Value};

pub use error::CheckpointError;
pub use tensor::{Dtype, Tensor};

use error::DidYouMean;
use file::{TensorFile, TensorRecord};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Largest index, in bytes. That of a model of 60,000 tensors has 6 MB.
const MAX_INDEX: usize = 64 << 20;
/// Most files of weights. The largest published checkpoints have some 200; each is mapped, and a process may have 65,530 maps.
const MAX_SHARDS: usize = 4096;

/// Bytes of every tensor that go into [`Checkpoint::fingerprint`].
const FINGERPRINT_SAMPLE: usize = 256;

/// An open checkpoint: its configuration and its memory-mapped tensors.
///
/// The files must not change while it is open: a shortened file makes reads of its mapping fault (SIGBUS on Unix),
/// which no error handling can catch. Replacing a file by renaming another over it is safe.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    config_text: String,
    files: Vec<TensorFile>,
    /// Every tensor's place: index into `files`, and what that file's header says.
    tensors: BTreeMap<String, (usize, TensorRecord)>,
}

impl Checkpoint {
    /// Opens the checkpoint in folder `dir` and checks every header against its file.
    ///
    /// # Errors
    /// [`CheckpointError`] for anything missing, malformed, truncated or outside the folder.
    pub fn open(dir: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        let dir = dir.as_ref().to_path_buf();
        if !dir.is_dir() {
            return Err(CheckpointError::NoFolder { dir });
        }
        let config_path = dir.join(CONFIG);
        let Some(config_text) = folder::read(&dir, CONFIG, MAX_TEXT)? else {
            return Err(CheckpointError::NoConfig { dir });
        };
        let config = parse_json(&config_path, &config_text)?;

        let (files, tensors) = if dir.join(SINGLE).exists() {
            open_single(&dir)?
        } else if dir.join(INDEX).exists() {
            open_sharded(&dir)?
        } else {
            let other_format = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
                .into_iter()
                .find(|name| dir.join(name).exists());
            return Err(CheckpointError::NoWeights { dir, other_format });
        };
        Ok(Checkpoint {
            dir,
            config,
            // It was parsed, so it is UTF-8.
            config_text: String::from_utf8_lossy(&config_text).into_owned(),
            files,
            tensors,
        })
    }

    /// The checkpoint's folder, as given to [`Checkpoint::open`].
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The contents of `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The text of `config.json`.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// The paths of the safetensors files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(TensorFile::path)
    }

    /// Names of all tensors, sorted. Includes those whose dtype [`Checkpoint::tensor`] would refuse.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name (`lm_head.weight` is absent where it is tied, for example).
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensor`] with the most similar name, or [`CheckpointError::UnsupportedDtype`].
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        let Some((name, (file, record))) = self.tensors.get_key_value(name) else {
            return Err(CheckpointError::NoTensor {
                dir: self.dir.clone(),
                name: name.to_owned(),
                hint: DidYouMean::among(name, self.names()),
            });
        };
        let file = &self.files[*file];
        let Some(dtype) = Dtype::from_safetensors(record.dtype) else {
            return Err(CheckpointError::UnsupportedDtype {
                file: file.path().to_path_buf(),
                name: name.clone(),
                found: record.dtype,
            });
        };
        Ok(Tensor::new(
            name,
            file.path(),
            dtype,
            &record.shape,
            file.bytes(record),
        ))
    }

    /// Bytes of all tensors together.
    pub fn size(&self) -> u64 {
        self.tensors
            .values()
            .map(|(_, record)| record.range.len() as u64)
            .sum()
    }

    /// A BLAKE3 hash that tells checkpoints apart in reports: `config.json`, then of every file in the order of their
    /// names its name, length, header and the first 256 bytes of each tensor.
    ///
    /// It does not read all weights, so it is no proof of integrity: a change deep inside a tensor goes unnoticed.
    pub fn fingerprint(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        // Every variable-length part goes in with its length before it, so that no two checkpoints concatenate alike.
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(self.config_text.as_bytes());
        for (index, file) in self.files.iter().enumerate() {
            part(file.name().as_bytes());
            part(&file.len().to_le_bytes());
            part(file.header());
            for (_, record) in self.tensors.values().filter(|(of, _)| *of == index) {
                let bytes = file.bytes(record);
                part(&bytes[..bytes.len().min(FINGERPRINT_SAMPLE)]);
            }
        }
        hasher.finalize()
    }
}

/// Tensors as the plain reference reads them.
impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<reference::Tensor<'_>, Box<dyn Error + Send + Sync>> {
        let tensor = self.tensor(name)?;
        let mut data = vec![0.0; tensor.rows() * tensor.columns()];
        for (row, out) in data.chunks_exact_mut(tensor.columns().max(1)).enumerate() {
            tensor.read_f32(row, 0, out)?;
        }
        Ok(reference::Tensor {
            shape: tensor.shape().to_vec(),
            data: Cow::Owned(data),
        })
    }
}

type Contents = (Vec<TensorFile>, BTreeMap<String, (usize, TensorRecord)>);

fn open_single(dir: &Path) -> Result<Contents, CheckpointError> {
    let (file, records) = TensorFile::open(dir, SINGLE)?;
    let tensors = records
        .into_iter()
        .map(|(name, record)| (name, (0, record)))
        .collect();
    Ok((vec![file], tensors))
}

/// `model.safetensors.index.json`; its `metadata` is of no use to us.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_sharded(dir: &Path) -> Result<Contents, CheckpointError> {
    let index_path = dir.join(INDEX);
    // It was there a moment ago.
    let text = folder::read(dir, INDEX, MAX_INDEX)?.unwrap_or_default();
    let index: Index = parse_json(&index_path, &text)?;

    let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        by_shard.entry(shard).or_default().push(tensor);
    }
    if by_shard.is_empty() {
        return Err(CheckpointError::EmptyIndex { index: index_path });
    }

    if by_shard.len() > MAX_SHARDS {
        return Err(CheckpointError::TooManyShards {
            index: index_path,
            found: by_shard.len(),
            limit: MAX_SHARDS,
        });
    }

    let mut files = Vec::with_capacity(by_shard.len());
    let mut tensors = BTreeMap::new();
    for (shard, names) in by_shard {
        if !stays_inside(&shard) {
            return Err(CheckpointError::ShardOutside {
                index: index_path,
                shard,
            });
        }
        if !dir.join(&shard).exists() {
            return Err(CheckpointError::NoShard {
                index: index_path,
                shard,
                tensors: names.len(),
            });
        }
        let (file, mut records) = TensorFile::open(dir, &shard)?;
        for name in names {
            let Some(record) = records.remove(&name) else {
                return Err(CheckpointError::NotInShard {
                    index: index_path,
                    file: file.path().to_path_buf(),
                    name,
                });
            };
            tensors.insert(name, (files.len(), record));
        }
        files.push(file);
    }
    Ok((files, tensors))
}

/// Whether a shard's name is a relative path of plain components only.
fn stays_inside(shard: &str) -> bool {
    // A backslash is a plain character on Unix and a separator on Windows: refuse it so that a checkpoint means the
    // same everywhere.
    // One name for one file: `a//b` and `a/./b` have fewer components than parts.
    !shard.contains('\\')
        && shard.split('/').count() == Path::new(shard).components().count()
        && Path::new(shard)
            .components()
            .all(|component| matches!(component, Component::Normal(_)))
}

fn parse_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: &[u8],
) -> Result<T, CheckpointError> {
    serde_json::from_slice(text).map_err(|source| CheckpointError::Json {
        file: path.to_path_buf(),
        source,
    })
}
