//! The prompt file: reading it, and which prompts go into which batch.
//!
//! Owns the file format (described at the head of `bench/prompts/test_prompts.txt`) and the order of prompts. It must not
//! know a tokenizer or a model: what does not fit a model is left out by the caller, which knows the reason.

use std::collections::BTreeMap;
use std::fmt;

use crate::stats::Random;

/// Largest prompt file, in bytes: far more text than a run has time for.
pub const MAX_FILE: usize = 64 << 20;
/// Longest line that an error repeats, in bytes.
const MAX_SHOWN: usize = 80;

/// The category of prompts in a file that names none.
pub const UNCATEGORIZED: &str = "uncategorized";

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Category and number in it from 1: `code/3`.
    pub id: String,
    /// Category, as the file names it.
    pub category: String,
    /// The text, which is never empty.
    pub text: String,
}

/// A line that does not follow the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptError {
    /// Name of the file.
    pub file: String,
    /// Line, from 1; 0 where the whole file is meant.
    pub line: usize,
    /// The rule that is broken, and the mend.
    pub message: String,
}

impl fmt::Display for PromptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}: {}", self.file, self.message),
        }
    }
}

impl std::error::Error for PromptError {}

/// Reads a prompt file; `file` is its name in errors.
///
/// # Errors
/// The first line that breaks the format, or a file without prompts.
pub fn parse(bytes: &[u8], file: &str) -> Result<Vec<Prompt>, PromptError> {
    let error = |line: usize, message: String| PromptError {
        file: file.to_owned(),
        line,
        message,
    };
    let text = std::str::from_utf8(bytes).map_err(|utf8| {
        let line = 1 + bytes[..utf8.valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        error(
            line,
            "this is not UTF-8 text; save the file as UTF-8".to_owned(),
        )
    })?;
    let mut prompts: Vec<Prompt> = Vec::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut category = UNCATEGORIZED;
    // Editors on Windows put a byte order mark in front.
    for (index, line) in text.trim_start_matches('\u{feff}').split('\n').enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('@') {
            if name.is_empty()
                || !name
                    .chars()
                    .all(|c| c.is_alphanumeric() || c == '-' || c == '_')
            {
                let rule = "a category's name has letters, digits, - and _ only; a prompt that starts with @ is written as a JSON string";
                return Err(error(index + 1, format!("`{}`: {rule}", shorten(line))));
            }
            category = name;
            continue;
        }
        let text = if line.starts_with('"') {
            serde_json::from_str(line).map_err(|json| {
                let rule = "a line that starts with a double quote must be one JSON string";
                error(index + 1, format!("{rule} ({json})"))
            })?
        } else {
            line.to_owned()
        };
        if text.is_empty() {
            return Err(error(
                index + 1,
                "the prompt is empty; give it at least one character or remove the line".to_owned(),
            ));
        }
        let number = counts.entry(category).or_default();
        *number += 1;
        prompts.push(Prompt {
            id: format!("{category}/{number}"),
            category: category.to_owned(),
            text,
        });
    }
    if prompts.is_empty() {
        return Err(error(
            0,
            "there are no prompts in it; write one a line".to_owned(),
        ));
    }
    Ok(prompts)
}

/// A line, or its beginning.
fn shorten(line: &str) -> String {
    match line.char_indices().find(|(at, _)| *at >= MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// BLAKE3 of ids and texts, in hexadecimal: equal hashes are equal prompts in equal order.
pub fn hash(prompts: &[Prompt]) -> String {
    let mut hasher = blake3::Hasher::new();
    for text in prompts.iter().flat_map(|prompt| [&prompt.id, &prompt.text]) {
        // With its length, so that no two lists run together to one.
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The order in which prompts are used: categories in turn, each in an order of its own, so that any stretch of the list
/// has all categories about equally. The same seed gives the same order. Returns indices of `categories`, each once.
pub fn order(categories: &[&str], seed: u64) -> Vec<usize> {
    // In the order in which they are met first.
    let mut queues: Vec<Vec<usize>> = Vec::new();
    let mut queue_of: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, category) in categories.iter().enumerate() {
        let queue = *queue_of.entry(category).or_insert(queues.len());
        if queue == queues.len() {
            queues.push(Vec::new());
        }
        queues[queue].push(index);
    }
    let mut random = Random(seed);
    random.shuffle(&mut queues);
    for queue in &mut queues {
        random.shuffle(queue);
    }
    let longest = queues.iter().map(Vec::len).max().unwrap_or(0);
    // Those that are used up leave the round, so that many short ones cost nothing beside a long one.
    let mut order = Vec::with_capacity(categories.len());
    for turn in 0..longest {
        queues.retain(|queue| turn < queue.len());
        order.extend(queues.iter().map(|queue| queue[turn]));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[(&str, &str)]) {
        let prompts = parse(text.as_bytes(), "p.txt").expect("a valid file");
        let found: Vec<_> = prompts
            .iter()
            .map(|prompt| (prompt.id.as_str(), prompt.text.as_str()))
            .collect();
        assert_eq!(found, expected);
    }

    fn check_error(bytes: &[u8], expected: &str) {
        let error = parse(bytes, "p.txt").expect_err("an invalid file");
        assert!(error.to_string().starts_with(expected), "{error}");
    }

    #[test]
    fn plain_lines_and_categories() {
        check(
            "# head\n\n@a\n one \ntwo\n@b\nthree\n@a\nfour",
            &[
                ("a/1", "one"),
                ("a/2", "two"),
                ("b/1", "three"),
                ("a/3", "four"),
            ],
        );
        check(
            "one\ntwo\n",
            &[("uncategorized/1", "one"), ("uncategorized/2", "two")],
        );
    }

    #[test]
    fn json_lines_hold_everything() {
        check(
            "@x\n\" \\r\\n \"\n\"# @ \\\"\"\n\"\\ud83d\\ude00\"",
            &[("x/1", " \r\n "), ("x/2", "# @ \""), ("x/3", "\u{1f600}")],
        );
    }

    #[test]
    fn windows_line_ends_and_mark() {
        check("\u{feff}@a\r\none\r\n", &[("a/1", "one")]);
    }

    #[test]
    fn errors_name_the_line() {
        check_error(b"", "p.txt: there are no prompts");
        check_error(b"@a\n# nothing\n", "p.txt: there are no prompts");
        check_error(
            b"ok\n\"open\n",
            "p.txt:2: a line that starts with a double quote",
        );
        check_error(b"ok\n\"\"\n", "p.txt:2: the prompt is empty");
        check_error(b"@\n", "p.txt:1: `@`");
        check_error(b"@two words\n", "p.txt:1: `@two words`");
        check_error(b"ok\nfine\n\xff\n", "p.txt:3: this is not UTF-8");
    }

    #[test]
    fn the_hash_is_of_the_prompts_and_not_of_the_file() {
        let hash_of = |text: &str| hash(&parse(text.as_bytes(), "p.txt").expect("a valid file"));
        assert_eq!(
            hash_of("@a\none\ntwo"),
            hash_of("# head\n@a\n\none\n\"two\"")
        );
        for other in ["@a\none", "@a\ntwo\none", "@b\none\ntwo", "@a\nonet\nwo"] {
            assert_ne!(hash_of("@a\none\ntwo"), hash_of(other), "{other}");
        }
    }

    #[test]
    fn order_takes_categories_in_turn() {
        let categories = ["a", "a", "a", "b", "b", "c"];
        let found = order(&categories, 7);
        let mut sorted = found.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3, 4, 5]);
        let mut first: Vec<_> = found[..3].iter().map(|&index| categories[index]).collect();
        first.sort_unstable();
        assert_eq!(first, ["a", "b", "c"]);
        assert_eq!(found, order(&categories, 7));
        assert!((0..20).any(|seed| order(&categories, seed) != found));
    }
}
