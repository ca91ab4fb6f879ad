//! RON with source spans.
//!
//! Owns how graph text becomes Rust values that remember where they stood ([`Spanned`]), and how RON's errors become
//! [`Diagnostic`]s with the exact place and a "did you mean". It must not know what any field means.
//!
//! How it works: ron hands out a value's own slice of the text (`&RawValue`). A [`Spanned`] value takes its slice, notes
//! where it lies in the whole text, and reads itself from it. serde gives a `Deserialize` no context, so the text being
//! read, and the innermost error with its place, are kept in a thread-local for the length of one [`read`].

use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use ron::Options;
use ron::extensions::Extensions;
use ron::value::RawValue;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::diagnostics::{Diagnostic, Source, Span, did_you_mean};

/// A value and where it stands in the graph file.
#[derive(Clone, Debug, PartialEq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Its place.
    pub span: Span,
}

impl<T> Deref for Spanned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// The entries of a RON map in the order of the file, repeated keys included.
#[derive(Clone, Debug)]
pub(crate) struct Entries<T>(pub(crate) Vec<(Spanned<String>, T)>);

/// The text being read on this thread, by address, and the first error found in it.
struct Reading {
    address: usize,
    length: usize,
    error: Option<(ron::error::SpannedError, Span)>,
}

thread_local! {
    static READING: RefCell<Option<Reading>> = const { RefCell::new(None) };
}

/// Lets `Op(field: …)` stand for a variant that holds a struct, and an optional field be written without `Some(…)`.
fn options() -> Options {
    Options::default()
        .with_default_extension(Extensions::UNWRAP_VARIANT_NEWTYPES | Extensions::IMPLICIT_SOME)
}

/// The rule that text breaks if it is RON but not what a field takes.
pub(crate) const WRONG_TYPE: &str = "wrong-type";

/// Reads the `part` of the source's text. `rule` is what an error breaks that has no rule of its own.
pub(crate) fn read<'de, T: Deserialize<'de>>(
    source: &'de Source,
    part: Span,
    rule: &'static str,
) -> Result<T, Diagnostic> {
    let text = &source.text[part.start..part.end];
    READING.set(Some(Reading {
        address: source.text.as_ptr() as usize,
        length: source.text.len(),
        error: None,
    }));
    let result = options().from_str::<T>(text);
    let innermost = READING.take().and_then(|reading| reading.error);
    result.map_err(|error| {
        let (error, within) = innermost.unwrap_or((error, part));
        explain(source, within, rule, &error)
    })
}

/// Where a slice of the text being read stands; nothing outside of [`read`].
fn place(slice: &str) -> Span {
    READING.with_borrow(|reading| {
        let address = slice.as_ptr() as usize;
        reading
            .as_ref()
            .filter(|r| (r.address..=r.address + r.length).contains(&address))
            .map(|r| Span {
                start: address - r.address,
                end: address - r.address + slice.len(),
            })
            .unwrap_or_default()
    })
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Spanned<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?.trim().get_ron();
        let span = place(raw);
        options()
            .from_str(raw)
            .map(|value| Spanned { value, span })
            .map_err(|error| {
                let message = error.to_string();
                READING.with_borrow_mut(|reading| {
                    if let Some(reading) = reading {
                        reading.error.get_or_insert((error, span));
                    }
                });
                D::Error::custom(message)
            })
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of names in quotes, `{ \"name\": … }`")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

/// Turns an error that ron found while reading the text at `within` into a diagnostic.
fn explain(
    source: &Source,
    within: Span,
    rule: &'static str,
    error: &ron::error::SpannedError,
) -> Diagnostic {
    let text = &source.text[within.start..within.end];
    // ron counts lines and columns inside the slice it was given.
    let slice = Source {
        name: String::new(),
        text: text.to_owned(),
    };
    let byte =
        |position: ron::error::Position| within.start + slice.byte_of(position.line, position.col);
    let cursor = Span {
        start: byte(error.span.start),
        end: byte(error.span.end),
    };
    use ron::Error::*;
    match &error.code {
        NoSuchEnumVariant {
            expected, found, ..
        } => unknown(
            "unknown-operator",
            "operator",
            found,
            expected,
            word(source, within, cursor, found),
        ),
        NoSuchStructField {
            expected, found, ..
        } => unknown(
            "unknown-field",
            "field",
            found,
            expected,
            word(source, within, cursor, found),
        ),
        MissingStructField { field, .. } => Diagnostic::new(
            "missing-field",
            within,
            format!("the field `{field}` is missing"),
        )
        .label("in here")
        .help(format!("add `{field}: …`")),
        DuplicateStructField { field, .. } => Diagnostic::new(
            "duplicate-field",
            word(source, within, cursor, field),
            format!("the field `{field}` is given twice"),
        )
        .help("remove one of them"),
        // Only expressions have errors of their own.
        Message(message) => Diagnostic::new("expression", within, message.clone())
            .help("write a number, or in quotes an expression such as \"heads * head_dim\""),
        InvalidValueForType { expected, found } => Diagnostic::new(
            WRONG_TYPE,
            within,
            format!("expected {expected}, found {found}"),
        )
        .help("compiler/src/ops says what the fields of an operator take"),
        other => {
            // ron would have the reader set an option of its own.
            let message = match other {
                ExceededRecursionLimit => "it is nested too deeply for a graph".to_owned(),
                other => other.to_string(),
            };
            let mut first = message.chars();
            let message: String = first
                .next()
                .map_or_else(String::new, |c| c.to_lowercase().chain(first).collect());
            if rule == WRONG_TYPE {
                // A value on one line is shown as a whole; in a longer one the cursor shows more.
                let span = if text.contains('\n') { cursor } else { within };
                return Diagnostic::new(
                    rule,
                    span,
                    format!("this value does not fit here: {message}"),
                )
                .help("compiler/src/ops says what the fields of an operator take");
            }
            let next = source.text[cursor.end..].chars().next();
            let end = next.map_or(cursor.end, |c| cursor.end + c.len_utf8());
            let span = Span {
                start: cursor.end,
                end,
            };
            Diagnostic::new(rule, span, format!("this is not valid RON: {message}")).help(
                "a list is `[a, b]`, a map `{ \"name\": value }`, a structure `(field: value)`, \
                 and a comma follows every entry",
            )
        }
    }
}

fn unknown(
    rule: &'static str,
    kind: &str,
    found: &str,
    expected: &[&str],
    span: Span,
) -> Diagnostic {
    let near = did_you_mean(found, expected.iter().copied());
    let label = near.map_or_else(
        || format!("no {kind} has this name"),
        |near| format!("did you mean `{near}`?"),
    );
    let list: Vec<_> = expected.iter().map(|name| format!("`{name}`")).collect();
    Diagnostic::new(rule, span, format!("unknown {kind} `{found}`"))
        .label(label)
        .help(format!("the {kind}s here are {}", list.join(", ")))
}

/// The last place of an identifier before ron's cursor, which has just passed it; else all of `within`.
fn word(source: &Source, within: Span, cursor: Span, identifier: &str) -> Span {
    let boundary = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let text = &source.text[within.start..within.end];
    let reach = (cursor.end.max(cursor.start) - within.start + identifier.len()).min(text.len());
    let hits = text.match_indices(identifier).filter(|(at, _)| {
        boundary(text[..*at].chars().next_back())
            && boundary(text[at + identifier.len()..].chars().next())
    });
    let hit = hits.take_while(|(at, _)| *at <= reach).last();
    hit.map_or(within, |(at, _)| Span {
        start: within.start + at,
        end: within.start + at + identifier.len(),
    })
}
