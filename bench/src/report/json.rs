//! The JSON file: results as they are, and their schema.

use crate::results::{Results, SCHEMA_VERSION};

/// Why a file is no results of ours.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No JSON, or other fields.
    #[error("{file}: this is not a result file of mirage-bench ({cause})")]
    Malformed {
        /// The file.
        file: String,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// Of another version.
    #[error(
        "{file}: the results have schema version {found}, this mirage-bench reads {SCHEMA_VERSION}; measure again"
    )]
    Version {
        /// The file.
        file: String,
        /// Its version.
        found: u64,
    },
}

/// The text of the file.
///
/// # Errors
/// None for results of this program, whose numbers are all finite.
pub fn write(results: &Results) -> serde_json::Result<String> {
    serde_json::to_string_pretty(results).map(|text| text + "\n")
}

/// Reads a file that [`write()`] made; `file` is its name in errors.
///
/// # Errors
/// [`ReadError`].
pub fn read(text: &str, file: &str) -> Result<Results, ReadError> {
    let malformed = |cause| ReadError::Malformed {
        file: file.to_owned(),
        cause,
    };
    let value: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
    // The version first: another one explains the fields that do not fit.
    match value
        .get("schema_version")
        .and_then(serde_json::Value::as_u64)
    {
        Some(found) if found != u64::from(SCHEMA_VERSION) => Err(ReadError::Version {
            file: file.to_owned(),
            found,
        }),
        _ => serde_json::from_value(value).map_err(malformed),
    }
}

/// The JSON schema of the file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Results).to_value()
}
