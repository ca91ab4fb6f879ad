//! Diagnostics: one clear error with the place, the rule and the mend.
//!
//! Owns source files, byte spans into them and the rendering of errors. It must not know what a graph is; it does no IO.
//!
//! Two kinds of error leave the front end. A [`Diagnostic`] is the reader's to mend: it points into a file they wrote.
//! A [`Violation`] is ours: a `verify()` found a stage that breaks its own rules, which the stages' constructors never build.

mod excerpt;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use codespan_reporting::diagnostic::{Diagnostic as Report, Label, LabelStyle};
use codespan_reporting::term;
use serde::{Deserialize, Serialize};

use excerpt::{Excerpt, abridge};

/// Most errors that are shown of one file. Whoever mends these sees the next ones, and each excerpt costs a walk through
/// the file.
const MAX_SHOWN: usize = 20;

/// Longest name that is compared with others, in bytes: similarity takes the product of two lengths.
const MAX_NAME: usize = 200;

/// A byte range of the graph file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A text and the name it is known by.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// File name as errors print it.
    pub name: String,
    /// The whole text.
    pub text: String,
}

/// One error: what rule was broken, where, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Short kebab-case name of the broken rule.
    pub rule: &'static str,
    /// What is wrong, in one sentence.
    pub message: String,
    /// The place, then other places that matter, each with what to say there.
    pub places: Vec<(Span, String)>,
    /// The mend.
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error at `span`; `label`, `related` and `help` add to it.
    pub fn new(rule: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self {
            rule,
            message: message.into(),
            places: vec![(span, String::new())],
            help: None,
        }
    }

    /// Says something under the caret.
    pub fn label(mut self, text: impl Into<String>) -> Self {
        if let Some((_, label)) = self.places.first_mut() {
            *label = text.into();
        }
        self
    }

    /// Points to a second place.
    pub fn related(mut self, span: Span, text: impl Into<String>) -> Self {
        self.places.push((span, text.into()));
        self
    }

    /// Says how to mend it.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.help = Some(text.into());
        self
    }

    fn render(&self, source: &Source) -> String {
        let places: Vec<Range<usize>> = self
            .places
            .iter()
            .map(|(span, _)| source.clamp(*span))
            .collect();
        let excerpt = Excerpt::new(source, &places);
        let labels =
            self.places
                .iter()
                .zip(&places)
                .enumerate()
                .map(|(index, ((_, text), place))| {
                    let style = if index == 0 {
                        LabelStyle::Primary
                    } else {
                        LabelStyle::Secondary
                    };
                    Label::new(style, (), excerpt.range(place)).with_message(abridge(text))
                });
        let report = Report::error()
            .with_code(self.rule)
            .with_message(abridge(&self.message))
            .with_labels_iter(labels)
            .with_notes_iter(
                self.help
                    .iter()
                    .map(|help| abridge(&format!("help: {help}"))),
            );
        term::emit_into_string(&term::Config::default(), &excerpt, &report)
            // The spans were clamped, so this cannot happen; should it, the sentence must still reach the reader.
            .unwrap_or_else(|_| {
                format!("{}: error[{}]: {}\n", source.name, self.rule, self.message)
            })
    }
}

impl Source {
    /// The range that `span` covers, moved onto character boundaries inside the text.
    fn clamp(&self, span: Span) -> Range<usize> {
        let start = floor_char_boundary(&self.text, span.start);
        start..floor_char_boundary(&self.text, span.end.max(span.start)).max(start)
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn line_column(&self, byte: usize) -> (usize, usize) {
        let before = &self.text[..floor_char_boundary(&self.text, byte)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (
            before.matches('\n').count() + 1,
            before[line_start..].chars().count() + 1,
        )
    }

    /// Byte of a line and column, both from 1; the end of the line or text where they lie beyond it.
    pub fn byte_of(&self, line: usize, column: usize) -> usize {
        let mut start = 0;
        for _ in 1..line {
            match self.text[start..].find('\n') {
                Some(newline) => start += newline + 1,
                None => return self.text.len(),
            }
        }
        let rest = &self.text[start..];
        let line = &rest[..rest.find('\n').unwrap_or(rest.len())];
        let column = column.saturating_sub(1);
        start
            + line
                .char_indices()
                .nth(column)
                .map_or(line.len(), |(byte, _)| byte)
    }
}

fn floor_char_boundary(text: &str, byte: usize) -> usize {
    let mut byte = byte.min(text.len());
    while !text.is_char_boundary(byte) {
        byte -= 1;
    }
    byte
}

/// All errors found in one file; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    /// The file they point into.
    pub source: Arc<Source>,
    /// The errors in the order of their places.
    pub list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// `value` if there are no errors, else all of them in the order of their places.
    pub fn check<T>(source: &Arc<Source>, mut list: Vec<Diagnostic>, value: T) -> Result<T, Self> {
        if list.is_empty() {
            return Ok(value);
        }
        list.sort_by_key(|diagnostic| diagnostic.places.first().map_or(0, |(span, _)| span.start));
        Err(Self {
            source: Arc::clone(source),
            list,
        })
    }

    /// A single error.
    pub fn one(source: &Arc<Source>, diagnostic: Diagnostic) -> Self {
        Self {
            source: Arc::clone(source),
            list: vec![diagnostic],
        }
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rendered: Vec<_> = self
            .list
            .iter()
            .take(MAX_SHOWN)
            .map(|one| one.render(&self.source).trim_end().to_owned())
            .collect();
        f.write_str(&rendered.join("\n\n"))?;
        match self.list.len().saturating_sub(MAX_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n\nand {more} more errors in {}", self.source.name),
        }
    }
}

impl std::error::Error for Diagnostics {}

/// A stage breaks one of its own rules: a fault of the compiler, or of whoever changed a stage by hand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {stage} is not well-formed at {place}: {rule}")]
pub struct Violation {
    /// The stage, as people call it.
    pub stage: &'static str,
    /// Which node, weight or value.
    pub place: String,
    /// The rule that does not hold, with the numbers that break it.
    pub rule: String,
}

/// The candidate nearest to a misspelt word, if one is near enough to be meant.
pub fn did_you_mean<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    if word.len() > MAX_NAME {
        return None;
    }
    let folded = word.to_lowercase();
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= MAX_NAME)
        .map(|candidate| {
            (
                strsim::jaro_winkler(&folded, &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(similarity, _)| *similarity >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_bytes_are_inverse() {
        let source = Source {
            name: "a".into(),
            text: "ab\né\"x\nlast".into(),
        };
        for (byte, _) in source.text.char_indices().filter(|(_, c)| *c != '\n') {
            let (line, column) = source.line_column(byte);
            assert_eq!(source.byte_of(line, column), byte);
        }
        assert_eq!(source.line_column(source.text.len()), (3, 5));
        assert_eq!(source.byte_of(99, 1), source.text.len());
    }

    #[test]
    fn a_span_off_the_text_still_renders() {
        let source = Arc::new(Source {
            name: "a.ron".into(),
            text: "é".into(),
        });
        let error = Diagnostic::new("rule", Span { start: 1, end: 99 }, "message").help("mend");
        let text = Diagnostics::one(&source, error).to_string();
        assert!(
            text.contains("a.ron:1:1") && text.contains("help: mend"),
            "{text}"
        );
    }

    #[test]
    fn suggestions_are_near() {
        assert_eq!(did_you_mean("Liner", ["Linear", "Rope"]), Some("Linear"));
        assert_eq!(
            did_you_mean("rmsnorm", ["Linear", "RmsNorm"]),
            Some("RmsNorm")
        );
        assert_eq!(did_you_mean("Convolution", ["Linear", "Rope"]), None);
    }

    #[test]
    fn very_long_names_are_not_compared() {
        let long = "a".repeat(1 << 24);
        assert_eq!(did_you_mean(&long, [long.as_str()]), None);
        assert_eq!(
            did_you_mean("Liner", [long.as_str(), "Linear"]),
            Some("Linear")
        );
    }

    #[test]
    fn a_flood_of_errors_is_cut() {
        let source = Arc::new(Source {
            name: "a.ron".into(),
            text: "x".into(),
        });
        let list = vec![Diagnostic::new("rule", Span::default(), "message"); MAX_SHOWN + 5];
        let text = Diagnostics { source, list }.to_string();
        assert_eq!(text.matches("message").count(), MAX_SHOWN);
        assert!(text.ends_with("and 5 more errors in a.ron"), "{text}");
    }
}
