//! A checkpoint's config.json.
//!
//! Owns reading it and looking up keys. Which keys there are is the graph file's business.

use std::sync::Arc;

use serde_json::Value;

use crate::diagnostics::{Diagnostic, Diagnostics, Source, Span};
use crate::input::MAX_TEXT;

/// A parsed config.json, or none: then a graph's defaults count.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelConfig {
    /// The object, and the name of its file.
    parsed: Option<(String, Value)>,
}

impl ModelConfig {
    /// No config.json: the graph file's defaults count.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads a config.json. `file_name` is what errors call it; nothing is opened.
    ///
    /// # Errors
    /// Text that is not a JSON object, with its place.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, Diagnostics> {
        let source = Arc::new(Source {
            name: file_name.to_owned(),
            text: text.to_owned(),
        });
        let fail = |start: usize, message: String| {
            let span = Span {
                start,
                end: start + 1,
            };
            let error = Diagnostic::new("json-syntax", span, message)
                .help("this must be the config.json of a Hugging Face checkpoint");
            Err(Diagnostics::one(&source, error))
        };
        if text.len() > MAX_TEXT {
            return fail(0, format!("this is larger than {} MiB", MAX_TEXT >> 20));
        }
        match serde_json::from_str::<Value>(text) {
            Ok(value) if value.is_object() => Ok(Self {
                parsed: Some((file_name.to_owned(), value)),
            }),
            Ok(_) => fail(0, "this is not a JSON object".to_owned()),
            Err(error) => {
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                fail(
                    source.byte_of(error.line(), error.column()),
                    format!("this is not valid JSON: {message}"),
                )
            }
        }
    }

    /// Name of the file; `None` where there is none.
    pub fn file_name(&self) -> Option<&str> {
        self.parsed.as_ref().map(|(name, _)| name.as_str())
    }

    /// The value of a key; a dot goes into a nested object, and null counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let (_, root) = self.parsed.as_ref()?;
        key.split('.')
            .try_fold(root, |value, part| value.get(part))
            .filter(|value| !value.is_null())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_into_objects() {
        let config = ModelConfig::parse(r#"{"a": {"b": 2}, "n": null}"#, "config.json").unwrap();
        assert_eq!(config.get("a.b"), Some(&Value::from(2)));
        assert_eq!(config.get("a.c"), None);
        assert_eq!(config.get("n"), None);
        assert_eq!(ModelConfig::none().get("a"), None);
    }
}
