//! The tokenizer of a checkpoint: text to token ids and back, whole or as a stream.
//!
//! Owns opening `tokenizer.json` and the conventions of its use, on top of the `tokenizers` crate. It must not know chat
//! templates, prompts or when to stop; the ids that end a generation come from the checkpoint ([`stop_tokens`]).
//!
//! Conventions, those of transformers' `AutoTokenizer`:
//! - Encoding adds the special tokens that the tokenizer's own post-processor adds: Llama 3 puts its
//!   `<|begin_of_text|>` in front, Qwen3 adds none.
//! - Text that spells a special token (`<|im_end|>`) becomes that token. Text from people must therefore be checked
//!   before it is put into a prompt, where that matters.
//! - Truncation and padding that the file asks for are switched off: a prompt is never cut silently.
//! - Decoding leaves special tokens out. So it does ids that the tokenizer does not know: a model's vocabulary is often
//!   padded beyond the tokenizer's (Qwen3: 151936 against 151669).

mod stop;
mod stream;
#[cfg(test)]
mod tests;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointError, folder};

pub use stop::{StopTokensError, stop_tokens};
pub use stream::TextStream;

const FILE: &str = "tokenizer.json";
/// Largest tokenizer.json, in bytes. Gemma's, of 262,144 tokens, has 33 MB.
const MAX_FILE: usize = 128 << 20;

/// Why text could not be turned into tokens or back.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is no `tokenizer.json`.
    #[error(
        "{}: the folder has no tokenizer.json; copy it from where the weights came from, or make it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
        dir.display()
    )]
    Missing {
        /// The checkpoint's folder.
        dir: PathBuf,
    },
    /// `tokenizer.json` cannot be read.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// `tokenizer.json` is malformed.
    #[error("{}: not a tokenizer that can be loaded ({reason}); download it again", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("{}: the text cannot be encoded ({reason}); check the tokenizer's unknown token and byte fallback", file.display())]
    Encode {
        /// The file.
        file: PathBuf,
        /// What the tokenizer said.
        reason: String,
    },
    /// The tokenizer refused token ids.
    #[error("{}: the tokens cannot be decoded ({reason}); check the file's decoder", file.display())]
    Decode {
        /// The file.
        file: PathBuf,
        /// What the tokenizer said.
        reason: String,
    },
}

/// The crate's tokenizer; a panic of the crate over the file is an error like others.
fn parse(text: &[u8]) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
    catch_unwind(|| tokenizers::Tokenizer::from_bytes(text))
        .unwrap_or_else(|_| Err("its parts contradict each other".into()))
}

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    file: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Opens `tokenizer.json` in the checkpoint's folder.
    ///
    /// # Errors
    /// [`TokenizerError::Missing`] or [`TokenizerError::Malformed`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Tokenizer, TokenizerError> {
        let dir = dir.as_ref();
        let file = dir.join(FILE);
        let Some(text) = folder::read(dir, FILE, MAX_FILE)? else {
            return Err(TokenizerError::Missing {
                dir: dir.to_path_buf(),
            });
        };
        let malformed = |e: tokenizers::Error| TokenizerError::Malformed {
            file: file.clone(),
            reason: e.to_string(),
        };
        // The crate reads parts of the file anew, sure that they are JSON, and panics where a string is no text.
        serde_json::from_slice::<serde_json::Value>(&text)
            .map_err(|error| malformed(error.into()))?;
        let mut inner = parse(&text).map_err(malformed)?;
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);
        Ok(Tokenizer { file, inner })
    }

    /// The tokens of `text`, with what special tokens the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`], for tokenizers that cannot express every text. Byte-level ones (Qwen3, Llama 3) can.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match self.inner.encode_fast(text, true) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => Err(TokenizerError::Encode {
                file: self.file.clone(),
                reason: e.to_string(),
            }),
        }
    }

    /// The text of `tokens`, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner
            .decode(tokens, true)
            .map_err(|e| TokenizerError::Decode {
                file: self.file.clone(),
                reason: e.to_string(),
            })
    }

    /// A decoder that turns tokens into text as they arrive.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// Whether [`Tokenizer::decode`] takes the token into account: it is known and not special.
    fn has_text(&self, token: u32) -> bool {
        self.inner.id_to_token(token).is_some_and(|spelling| {
            !self
                .inner
                .get_added_vocabulary()
                .is_special_token(&spelling)
        })
    }

    /// The id of the token spelled `token` (`<|im_end|>`), if there is one.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of tokens the tokenizer knows, added ones included. The model's vocabulary may be larger.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
