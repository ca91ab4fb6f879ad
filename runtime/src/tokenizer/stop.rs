//! The tokens that end a generation, as the checkpoint names them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

const FILE: &str = "generation_config.json";
const KEY: &str = "eos_token_id";

/// Why the stop tokens could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StopTokensError {
    /// The operating system refused.
    #[error("{}: cannot be read ({source}); check that it is a file and its permissions", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
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
        /// The value found.
        found: Value,
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
    match fs::read(&file) {
        Ok(text) => {
            let generation: Map<String, Value> =
                serde_json::from_slice(&text).map_err(|source| StopTokensError::Json {
                    file: file.clone(),
                    source,
                })?;
            if let Some(tokens) = token_ids(&file, &generation)? {
                return Ok(tokens);
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(StopTokensError::Io { file, source }),
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
                found: value.clone(),
            });
        }
    };
    tokens.sort_unstable();
    tokens.dedup();
    Ok(Some(tokens))
}
