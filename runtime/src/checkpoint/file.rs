//! One safetensors file: mapped, its header parsed and checked against the file's length.
//!
//! The format: 8 bytes with the header's length (little-endian), the header (JSON: per tensor its dtype, shape and byte
//! range), then the tensors' bytes, little-endian and without gaps. The parsing itself is the `safetensors` crate's;
//! this file turns its terse errors into ones that say what to do.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensorError};
use safetensors::{Dtype, SafeTensors};

use super::error::CheckpointError;
use super::folder;

/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;
/// The longest header the format allows, in bytes.
const MAX_HEADER: u64 = 100_000_000;
/// How the text file begins that Git LFS leaves in place of a file it has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A mapped safetensors file.
#[derive(Debug)]
pub(super) struct TensorFile {
    name: String,
    path: PathBuf,
    map: Mmap,
    /// Where the header ends and the tensors' bytes begin.
    data: usize,
}

/// What a header says of one tensor.
#[derive(Debug)]
pub(super) struct TensorRecord {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes within the file's data; checked to lie inside and to fit shape and dtype.
    pub(super) range: Range<usize>,
}

impl TensorFile {
    /// Maps `dir/name` and parses its header into the tensors it holds.
    pub(super) fn open(
        dir: &Path,
        name: &str,
    ) -> Result<(TensorFile, BTreeMap<String, TensorRecord>), CheckpointError> {
        let (path, file) = folder::open(dir, name)?;
        let length = file
            .metadata()
            .map_err(|e| CheckpointError::io(&path, e))?
            .len();
        // Also keeps an empty file, which some systems refuse to map, away from the mapping.
        if length < LENGTH_BYTES as u64 {
            return Err(CheckpointError::Truncated {
                file: path,
                found: length,
                expected: LENGTH_BYTES as u64,
            });
        }
        // SAFETY: the mapping is read-only and private to us; that nobody shortens or rewrites the file meanwhile is
        // the documented condition of `Checkpoint`.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(&path, e))?;
        check_end(&path, &map)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| explain(&path, &map, e))?;
        let records = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let range = info.data_offsets.0..info.data_offsets.1;
                (
                    name,
                    TensorRecord {
                        dtype: info.dtype,
                        shape: info.shape.clone(),
                        range,
                    },
                )
            })
            .collect();
        Ok((
            TensorFile {
                name: name.to_owned(),
                path,
                map,
                data: LENGTH_BYTES + header,
            },
            records,
        ))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its path below the checkpoint's folder.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the whole file.
    pub(super) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// The header's bytes, its length included.
    pub(super) fn header(&self) -> &[u8] {
        &self.map[..self.data]
    }

    /// The bytes of a tensor of this file.
    pub(super) fn bytes(&self, record: &TensorRecord) -> &[u8] {
        &self.map[self.data..][record.range.clone()]
    }
}

/// Refuses a header whose tensors end beyond all addresses: the parser adds to their end unchecked.
fn check_end(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    match metadata_of(bytes) {
        Some((_, metadata)) if metadata.data_len() > isize::MAX as usize => {
            Err(CheckpointError::Header {
                file: path.to_path_buf(),
                reason: format!("its tensors end at byte {}", metadata.data_len()),
            })
        }
        _ => Ok(()),
    }
}

/// Turns the parser's error into one that says what is wrong with this very file.
fn explain(path: &Path, bytes: &[u8], error: SafeTensorError) -> CheckpointError {
    let file = path.to_path_buf();
    if bytes.starts_with(LFS_POINTER) {
        return CheckpointError::LfsPointer { file };
    }
    let found = bytes.len() as u64;
    match error {
        SafeTensorError::HeaderTooSmall => CheckpointError::Truncated {
            file,
            found,
            expected: LENGTH_BYTES as u64,
        },
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            CheckpointError::HeaderTooLarge {
                file,
                claimed: header_length(bytes),
                limit: MAX_HEADER.min(found - LENGTH_BYTES as u64),
            }
        }
        SafeTensorError::MetadataIncompleteBuffer => match expected_length(bytes) {
            Some(expected) if found < expected => CheckpointError::Truncated {
                file,
                found,
                expected,
            },
            Some(expected) => CheckpointError::TrailingBytes {
                file,
                found,
                expected,
            },
            None => CheckpointError::Header {
                file,
                reason: error.to_string(),
            },
        },
        other => CheckpointError::Header {
            file,
            reason: other.to_string(),
        },
    }
}

/// The first eight bytes as the header's length; 0 where there are fewer.
fn header_length(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk::<LENGTH_BYTES>()
        .map_or(0, |length| u64::from_le_bytes(*length))
}

/// Bytes the whole file should have by its header, if that parses.
fn expected_length(bytes: &[u8]) -> Option<u64> {
    let (end, metadata) = metadata_of(bytes)?;
    end.checked_add(metadata.data_len())
        .map(|length| length as u64)
}

/// Where the header ends, and what it says; `None` where it does not parse.
fn metadata_of(bytes: &[u8]) -> Option<(usize, Metadata)> {
    let header = usize::try_from(header_length(bytes)).ok()?;
    let end = LENGTH_BYTES.checked_add(header)?;
    let metadata = serde_json::from_slice(bytes.get(LENGTH_BYTES..end)?).ok()?;
    Some((end, metadata))
}
