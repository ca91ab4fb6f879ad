//! Files from outside, read whole: none is taken on trust to be small, or to be a file at all.
//!
//! Owns the one bounded read that every reader of the project goes through. It must not know what is in a file, and the
//! stages do not use it: they are given texts.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Largest graph, profile or config.json, in bytes. Those of real models have at most some tens of KB; what is larger is something
/// else, and a diagnostic holds the text several times.
pub const MAX_TEXT: usize = 4 << 20;

/// Why a file was not read. Reads on from the file's name: `x.ron cannot be read: it is larger than 4 MiB`.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The operating system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is larger than such a file can be.
    #[error("it is larger than {} MiB", .limit >> 20)]
    TooLarge {
        /// Bytes it may have.
        limit: usize,
    },
    /// It is no text.
    #[error("it is not UTF-8 text (byte {at} is not)")]
    NotText {
        /// The first byte that is not.
        at: usize,
    },
}

/// A whole file of at most `limit` bytes. It may be a pipe; of an endless one no more than the limit is read.
///
/// # Errors
///
/// [`InputError::Io`], [`InputError::TooLarge`].
pub fn read(path: &Path, limit: usize) -> Result<Vec<u8>, InputError> {
    read_from(File::open(path)?, limit)
}

/// The same of a file that is open.
///
/// # Errors
///
/// As [`read`].
pub fn read_from(file: File, limit: usize) -> Result<Vec<u8>, InputError> {
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(InputError::TooLarge { limit });
    }
    Ok(bytes)
}

/// A whole text file of at most `limit` bytes.
///
/// # Errors
///
/// All of [`InputError`].
pub fn read_text(path: &Path, limit: usize) -> Result<String, InputError> {
    String::from_utf8(read(path, limit)?).map_err(|error| InputError::NotText {
        at: error.utf8_error().valid_up_to(),
    })
}
