//! What can be wrong with a checkpoint. Every message names the file, the fault and the mend.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use mirage_compiler::input::InputError;

/// Why a checkpoint could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The path is not a folder.
    #[error("{}: no such folder; give the folder that holds config.json and the safetensors files", dir.display())]
    NoFolder {
        /// The path given.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: cannot be read ({source}); check that it is a file and its permissions", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A pipe, a device or a folder: reading it could take for ever.
    #[error("{}: not a regular file; put the file itself there, as it was downloaded", file.display())]
    NotAFile {
        /// What it is called.
        file: PathBuf,
    },
    /// Larger than such a file can be.
    #[error("{}: larger than {} MiB, which no such file is; download it again", file.display(), limit >> 20)]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Bytes it may have.
        limit: usize,
    },
    /// A symbolic link leads out of the checkpoint.
    #[error(
        "{}: a link to {}, outside of the model's folder; put the file itself there (in a Hugging Face cache, links into its blobs are followed)",
        file.display(),
        target.display()
    )]
    LinkOutside {
        /// The link.
        file: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// There is no `config.json`.
    #[error("{}: the folder has no config.json; copy it from where the weights came from", dir.display())]
    NoConfig {
        /// The checkpoint's folder.
        dir: PathBuf,
    },
    /// A JSON file is malformed or has the wrong structure.
    #[error("{}: not the JSON it should be ({source}); mend the file or download it again", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// There is neither a safetensors file nor an index.
    #[error(
        "{}: the folder has neither model.safetensors nor model.safetensors.index.json{}",
        dir.display(),
        match other_format {
            Some(name) => format!("; {name} is a pickle, which we do not load: convert it with transformers' save_pretrained"),
            None => "; download the weights in safetensors format".to_owned(),
        }
    )]
    NoWeights {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// Weights in PyTorch's own format that lie there instead.
        other_format: Option<&'static str>,
    },
    /// The weights are a placeholder that Git LFS left.
    #[error("{}: a Git LFS pointer, not weights; run `git lfs pull` in its folder", file.display())]
    LfsPointer {
        /// The file.
        file: PathBuf,
    },
    /// The file ends before its header or data does.
    #[error("{}: truncated: {found} bytes of {expected}; download it again", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it needs by what its header says.
        expected: u64,
    },
    /// The header's length, the first eight bytes, cannot be true.
    #[error(
        "{}: the first 8 bytes claim a header of {claimed} bytes, but {limit} are possible here; the file is truncated or not safetensors: download it again",
        file.display()
    )]
    HeaderTooLarge {
        /// The file.
        file: PathBuf,
        /// Bytes of header claimed.
        claimed: u64,
        /// Bytes that follow in the file, or the format's limit where that is less.
        limit: u64,
    },
    /// The file goes on after its last tensor.
    #[error(
        "{}: {found} bytes, but its header accounts for {expected} only; write it again, or download it again",
        file.display()
    )]
    TrailingBytes {
        /// The file.
        file: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes by what its header says.
        expected: u64,
    },
    /// The header is not what safetensors asks for.
    #[error("{}: the safetensors header is wrong ({reason}); write it again, or download it again", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What the parser found.
        reason: String,
    },
    /// The index lists no tensors.
    #[error("{}: weight_map is empty; download the index again", index.display())]
    EmptyIndex {
        /// The index.
        index: PathBuf,
    },
    /// The index names more files than any checkpoint has.
    #[error("{}: weight_map names {found} files, at most {limit} are opened; download the index again", index.display())]
    TooManyShards {
        /// The index.
        index: PathBuf,
        /// Files it names.
        found: usize,
        /// Files that are opened.
        limit: usize,
    },
    /// The index points outside the checkpoint's folder.
    #[error(
        "{}: weight_map names the file {shard:?}, but shards must lie in the model's folder: use a plain file name",
        index.display()
    )]
    ShardOutside {
        /// The index.
        index: PathBuf,
        /// The offending name.
        shard: String,
    },
    /// A shard that the index names does not exist.
    #[error(
        "{}: the shard {shard} is not there, and {tensors} tensor(s) are in it; download it into the same folder",
        index.display()
    )]
    NoShard {
        /// The index.
        index: PathBuf,
        /// The shard's name.
        shard: String,
        /// How many tensors it should hold.
        tensors: usize,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error(
        "{}: no tensor {name}, though {} says so; download both again, they must be of one revision",
        file.display(),
        index.display()
    )]
    NotInShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        file: PathBuf,
        /// The tensor.
        name: String,
    },
    /// No tensor of this name.
    #[error("{}: the checkpoint has no tensor {name}{hint}; check that model and graph belong together", dir.display())]
    NoTensor {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The name asked for.
        name: String,
        /// The most similar name.
        hint: DidYouMean,
    },
    /// A tensor of a number format that is not read.
    #[error(
        "{}: tensor {name} is {found}, and only BF16, F16 and F32 are read; use an unquantized checkpoint, or convert it",
        file.display()
    )]
    UnsupportedDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its format.
        found: safetensors::Dtype,
    },
    /// A tensor has another shape than the model asks for.
    #[error(
        "{}: tensor {name} has shape {found:?}, but {expected:?} is expected; check that config.json belongs to these weights",
        file.display()
    )]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// The expected shape.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A read beyond a row or beyond the last row.
    #[error(
        "{}: row {row}, columns {start}..{end} of tensor {name} asked for, but it has {rows} rows of {columns}; check its shape before reading",
        file.display()
    )]
    OutOfRange {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// The row asked for.
        row: usize,
        /// First column asked for.
        start: usize,
        /// One past the last column asked for.
        end: usize,
        /// Rows there are.
        rows: usize,
        /// Columns there are.
        columns: usize,
    },
}

impl CheckpointError {
    pub(super) fn input(file: &Path, error: InputError) -> CheckpointError {
        let file = file.to_path_buf();
        match error {
            InputError::Io(source) => CheckpointError::Io { file, source },
            InputError::TooLarge { limit } => CheckpointError::TooLarge { file, limit },
            InputError::NotText { .. } => CheckpointError::Io {
                file,
                source: io::Error::new(io::ErrorKind::InvalidData, error),
            },
        }
    }

    pub(super) fn io(file: &Path, source: io::Error) -> CheckpointError {
        CheckpointError::Io {
            file: file.to_path_buf(),
            source,
        }
    }
}

/// The name most similar to one that does not exist, if any is similar enough. Displays as ` (did you mean …?)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DidYouMean(Option<String>);

impl DidYouMean {
    /// Picks the name closest to `wanted`; the first in order of iteration where several are equally close.
    pub(super) fn among<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> DidYouMean {
        /// Longest name that is compared, in bytes: the comparison takes the product of both lengths, and a header can hold
        /// names of any length.
        const LONGEST: usize = 256;
        if wanted.len() > LONGEST {
            return DidYouMean(None);
        }
        // Below this, the names share little more than `model.layers.` and the hint would mislead.
        const SIMILAR_ENOUGH: f64 = 0.7;
        let mut best: Option<(f64, &str)> = None;
        for name in names.filter(|name| name.len() <= LONGEST) {
            let similarity = strsim::normalized_damerau_levenshtein(wanted, name);
            if similarity >= SIMILAR_ENOUGH && best.is_none_or(|(score, _)| similarity > score) {
                best = Some((similarity, name));
            }
        }
        DidYouMean(best.map(|(_, name)| name.to_owned()))
    }
}

impl fmt::Display for DidYouMean {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(name) => write!(f, " (did you mean {name}?)"),
            None => Ok(()),
        }
    }
}
