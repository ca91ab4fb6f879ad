//! The files of a model's folder, which somebody else made: opened so that nothing outside of it is read.
//!
//! Owns which files are ours to open. A file is regular: a pipe would be waited for, a device read without end. Where it is a
//! symbolic link, the end of the link lies in the folder, or in the `blobs` of the Hugging Face cache that the folder is a
//! snapshot of: `models--Qwen--Qwen3-0.6B/snapshots/<revision>/model.safetensors` links to `../../blobs/<hash>`.
//!
//! The folder itself may be a link to anywhere: the caller named it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use mirage_compiler::input;

use super::error::CheckpointError;

/// Opens the file `name` of the folder.
pub(crate) fn open(dir: &Path, name: &str) -> Result<(PathBuf, File), CheckpointError> {
    let path = dir.join(name);
    let io = |error| CheckpointError::io(&path, error);
    let target = fs::canonicalize(&path).map_err(io)?;
    let home = fs::canonicalize(dir).map_err(io)?;
    if !target.starts_with(&home) && !blobs(&home).is_some_and(|blobs| target.starts_with(blobs)) {
        return Err(CheckpointError::LinkOutside { file: path, target });
    }
    if !fs::metadata(&target).map_err(io)?.is_file() {
        return Err(CheckpointError::NotAFile { file: path });
    }
    let file = File::open(&target).map_err(io)?;
    Ok((path, file))
}

/// The whole file `name` of the folder, of at most `limit` bytes; `None` where there is none.
pub(crate) fn read(
    dir: &Path,
    name: &str,
    limit: usize,
) -> Result<Option<Vec<u8>>, CheckpointError> {
    match open(dir, name) {
        Ok((path, file)) => input::read_from(file, limit)
            .map(Some)
            .map_err(|error| CheckpointError::input(&path, error)),
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Where the files of a cached snapshot really are.
fn blobs(home: &Path) -> Option<PathBuf> {
    let snapshots = home.parent()?;
    let repository = snapshots.parent()?;
    (snapshots.file_name() == Some(OsStr::new("snapshots"))).then(|| repository.join("blobs"))
}
