//! The tokens that end a generation, as the checkpoint names them.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use mirage_compiler::input::MAX_TEXT;

use crate::checkpoint::{CheckpointError, folder};

const FILE: &str = "generation_config.json";
const KEY: &str = "eos_token_id";

/// Why the stop tokens could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StopTokensError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// The file is no JSON object.
    #[error("{}: not the JSON it should be ({source}); mend the file or download it again", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// `eos_token_id` is neither a token id nor a list of them.
    #[error(
        "{}: eos_token_id is {found}, but must be a token id (0 to 4294967295) or a list of them; write the id of the tokenizer's end token",
        file.display()
    )]
    Value {
        /// The file.
        file: PathBuf,
        /// The value found, or its beginning.
        found: String,
    },
}

/// `eos_token_id` in both its forms.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

/// The ids of the tokens that end a generation, sorted and without duplicates: `eos_token_id` of
/// `generation_config.json` in the checkpoint's folder or, where that is absent or null, of `config` (the contents of
/// `config.json`). Empty where neither names one; only the length limit ends a generation then.
///
/// # Errors
/// [`StopTokensError`] where the file or the value is malformed.
pub fn stop_tokens(
    dir: impl AsRef<Path>,
    config: &Map<String, Value>,
) -> Result<Vec<u32>, StopTokensError> {
    let dir = dir.as_ref();
    let file = dir.join(FILE);
    if let Some(text) = folder::read(dir, FILE, MAX_TEXT)? {
        let generation: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|source| StopTokensError::Json {
                file: file.clone(),
                source,
            })?;
        if let Some(tokens) = token_ids(&file, &generation)? {
            return Ok(tokens);
        }
    }
    Ok(token_ids(&dir.join("config.json"), config)?.unwrap_or_default())
}

/// `None` where the key is absent or null.
fn token_ids(file: &Path, map: &Map<String, Value>) -> Result<Option<Vec<u32>>, StopTokensError> {
    let value = match map.get(KEY) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    let mut tokens = match TokenIds::deserialize(value) {
        Ok(TokenIds::One(token)) => vec![token],
        Ok(TokenIds::Many(tokens)) => tokens,
        Err(_) => {
            return Err(StopTokensError::Value {
                file: file.to_path_buf(),
                found: shorten(value),
            });
        }
    };
    tokens.sort_unstable();
    tokens.dedup();
    Ok(Some(tokens))
}

/// JSON for an error message.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
