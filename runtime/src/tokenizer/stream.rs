//! Text as tokens arrive: only whole characters leave, and what has left never changes.
//!
//! A character may be split over tokens (byte-level BPE knows bytes, not characters), and a token's text may depend on
//! its neighbours (SentencePiece drops the space before the first word). So the stream keeps a short window of tokens,
//! decodes all of it at every step and lets out what follows the text already out.

use super::{Tokenizer, TokenizerError};

/// An unfinished UTF-8 character is at most three bytes. It decodes to one U+FFFD in byte-level tokenizers and to one for
/// each byte in those with byte fallback. Replacement characters before that stand for bytes that can never be text.
const UNFINISHED: usize = 3;

/// Where the last tokens never complete a character, the window is cut to `KEEP` tokens once it reaches `LIMIT`, so that
/// the cost of a step stays bounded. `KEEP` is above `UNFINISHED`, so what is held back stays inside.
const LIMIT: usize = 32;
const KEEP: usize = 8;

/// Turns tokens into text piece by piece; made by [`Tokenizer::stream`].
///
/// The pieces and [`TextStream::finish`], joined, are [`Tokenizer::decode`] of all tokens. One exception: a tokenizer
/// with byte fallback revokes a character when a later byte of the same run is invalid, which a stream cannot.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens: first those whose text is out and serve as context, then those not (fully) out.
    pub(super) window: Vec<u32>,
    /// How many tokens at the front of the window are context only.
    context: usize,
    /// The part of the window's text that is out.
    emitted: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> TextStream<'a> {
        TextStream {
            tokenizer,
            window: Vec::new(),
            context: 0,
            emitted: String::new(),
        }
    }

    /// Takes the next token and returns the text that it completes, often empty.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        // Tokens without text would push those that are held back out of the window.
        if !self.tokenizer.has_text(token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window)?;
        let settled = settled(&text);
        let new = beyond(&self.emitted, settled).to_owned();

        if settled.len() == text.len() && !new.is_empty() {
            // Nothing is held back: the tokens that made the new text are context enough for the next.
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.emitted = self.tokenizer.decode(&self.window)?;
        } else if self.window.len() >= LIMIT {
            self.window.drain(..LIMIT - KEEP);
            self.context = 0;
            let text = self.tokenizer.decode(&self.window)?;
            self.emitted = self::settled(&text).to_owned();
        } else if !new.is_empty() {
            self.emitted = settled.to_owned();
        }
        Ok(new)
    }

    /// Ends the stream and returns what was held back: U+FFFD for a character that never became whole.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.window)?;
        Ok(beyond(&self.emitted, &text).to_owned())
    }
}

/// `text` without the replacement characters at its end that later tokens may turn into a character.
fn settled(text: &str) -> &str {
    let mut settled = text;
    for _ in 0..UNFINISHED {
        settled = settled
            .strip_suffix(char::REPLACEMENT_CHARACTER)
            .unwrap_or(settled);
    }
    settled
}

/// What of `text` is not in `emitted` yet: all after their common beginning.
fn beyond<'t>(emitted: &str, text: &'t str) -> &'t str {
    let common: usize = emitted
        .chars()
        .zip(text.chars())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum();
    &text[common..]
}
