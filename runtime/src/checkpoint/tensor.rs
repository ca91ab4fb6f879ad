//! A tensor of a checkpoint: its shape and dtype, and its elements as bf16 or f32.
//!
//! Reading converts on the way and allocates nothing. It assumes no alignment, because safetensors promises none.

use std::fmt;
use std::path::Path;

use half::{bf16, f16};

use super::error::CheckpointError;

/// The number formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// `None` for a format that is not read.
    pub(super) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
        match dtype {
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::F32 => Some(Dtype::F32),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        })
    }
}

/// A view of one tensor in the mapped file, elements in row-major order.
///
/// Its rows run along the last dimension: a tensor of shape `[.., columns]` has as many rows as the product of the other
/// dimensions, and a vector is one row.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    name: &'a str,
    file: &'a Path,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// `bytes` hold exactly the elements of `shape`: the file's header was checked for it.
    pub(super) fn new(
        name: &'a str,
        file: &'a Path,
        dtype: Dtype,
        shape: &'a [usize],
        bytes: &'a [u8],
    ) -> Tensor<'a> {
        Tensor {
            name,
            file,
            dtype,
            shape,
            bytes,
        }
    }

    /// Its name in the checkpoint.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The file that holds it.
    pub fn file(&self) -> &'a Path {
        self.file
    }

    /// Format of its elements in the file.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Its elements as they lie in the file: little-endian, row-major, of no particular alignment.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Elements of a row: the last dimension, or 1 for a scalar.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows; 0 where a row has no elements.
    pub fn rows(&self) -> usize {
        (self.bytes.len() / self.dtype.size())
            .checked_div(self.columns())
            .unwrap_or(0)
    }

    /// Refuses any other shape than `expected`.
    ///
    /// # Errors
    /// [`CheckpointError::Shape`].
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            file: self.file.to_path_buf(),
            name: self.name.to_owned(),
            expected: expected.to_vec(),
            found: self.shape.to_vec(),
        })
    }

    /// Fills `out` with the elements of `row` from column `start` on, rounded to bf16 (to nearest, ties to even).
    ///
    /// # Errors
    /// [`CheckpointError::OutOfRange`] where the row has not that many elements; `out` is untouched then.
    pub fn read_bf16(
        &self,
        row: usize,
        start: usize,
        out: &mut [bf16],
    ) -> Result<(), CheckpointError> {
        let bytes = self.slice(row, start, out.len())?;
        match self.dtype {
            // A copy in one piece where the machine's order is the file's: loading is as fast as this line.
            Dtype::Bf16 if cfg!(target_endian = "little") => {
                bytemuck::cast_slice_mut::<_, u8>(out).copy_from_slice(bytes);
            }
            Dtype::Bf16 => convert(bytes, out, bf16::from_le_bytes),
            // f16 to f32 is exact, so this rounds once.
            Dtype::F16 => convert(bytes, out, |b| {
                bf16::from_f32(f16::from_le_bytes(b).to_f32())
            }),
            Dtype::F32 => convert(bytes, out, |b| bf16::from_f32(f32::from_le_bytes(b))),
        }
        Ok(())
    }

    /// Fills `out` with the elements of `row` from column `start` on, exactly.
    ///
    /// # Errors
    /// [`CheckpointError::OutOfRange`] where the row has not that many elements; `out` is untouched then.
    pub fn read_f32(
        &self,
        row: usize,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let bytes = self.slice(row, start, out.len())?;
        match self.dtype {
            Dtype::Bf16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
        }
        Ok(())
    }

    /// The bytes of `count` elements of `row` from column `start` on.
    fn slice(&self, row: usize, start: usize, count: usize) -> Result<&'a [u8], CheckpointError> {
        let (rows, columns) = (self.rows(), self.columns());
        let end = start.saturating_add(count);
        if row >= rows || end > columns {
            return Err(CheckpointError::OutOfRange {
                file: self.file.to_path_buf(),
                name: self.name.to_owned(),
                row,
                start,
                end,
                rows,
                columns,
            });
        }
        // Inside `bytes` by the check above, so nothing overflows.
        let size = self.dtype.size();
        let first = (row * columns + start) * size;
        Ok(&self.bytes[first..first + count * size])
    }
}

/// Converts `N` bytes to one element, for every element of `out`.
fn convert<const N: usize, T>(bytes: &[u8], out: &mut [T], element: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (to, from) in out.iter_mut().zip(elements) {
        *to = element(*from);
    }
}
