//! The prompt file against the tokenizer it is written for: Qwen3's own.

use std::io::Read as _;
use std::path::Path;

use flate2::read::GzDecoder;
use mirage_bench::prompts::{Prompt, parse};
use mirage_runtime::tokenizer::Tokenizer;

const CATEGORIES: [&str; 10] = [
    "short",
    "medium",
    "long",
    "code",
    "qa",
    "creative",
    "technical",
    "reasoning",
    "multilingual",
    "edge",
];

fn prompts() -> Vec<Prompt> {
    parse(
        include_bytes!("../prompts/test_prompts.txt"),
        "test_prompts.txt",
    )
    .expect("the file follows its format")
}

/// Qwen3's tokenizer, unpacked into a folder of its own.
fn tokenizer() -> Tokenizer {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts/tokenizer/tokenizer.json.gz");
    let mut json = Vec::new();
    let file = std::fs::File::open(packed).expect("the tokenizer is there");
    GzDecoder::new(file).read_to_end(&mut json).expect("gzip");
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("tokenizer.json"), json).expect("a file");
    Tokenizer::open(dir.path()).expect("a tokenizer")
}

#[test]
fn ten_categories_of_at_least_thirteen() {
    let prompts = prompts();
    assert!(prompts.len() >= 130);
    for category in CATEGORIES {
        let count = prompts
            .iter()
            .filter(|prompt| prompt.category == category)
            .count();
        assert!(count >= 13, "{category} has {count}");
    }
    let known = |prompt: &Prompt| CATEGORIES.contains(&prompt.category.as_str());
    assert!(prompts.iter().all(known));
    let mut texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), prompts.len(), "a prompt is there twice");
}

#[test]
fn lengths_are_in_their_bands() {
    let tokenizer = tokenizer();
    for prompt in prompts() {
        let band = match prompt.category.as_str() {
            "short" => 1..=10,
            "medium" => 10..=30,
            "long" => 30..=60,
            _ => 1..=640,
        };
        let tokens = tokenizer.encode(&prompt.text).expect("byte-level").len();
        assert!(
            band.contains(&tokens),
            "{} has {tokens} tokens, but {band:?} are its band",
            prompt.id
        );
    }
}

#[test]
fn known_encodings_of_qwen3() {
    let tokenizer = tokenizer();
    assert_eq!(
        tokenizer.encode("Hello, world!").expect("text"),
        [9707, 11, 1879, 0]
    );
    assert_eq!(
        tokenizer.encode("你好，世界").expect("text"),
        [108386, 3837, 99489]
    );
}

#[test]
fn edge_cases_hold_what_they_are_there_for() {
    let tokenizer = tokenizer();
    let edge: Vec<Prompt> = prompts()
        .into_iter()
        .filter(|prompt| prompt.category == "edge")
        .collect();
    let has = |what: &str, holds: &dyn Fn(&str) -> bool| {
        assert!(
            edge.iter().any(|prompt| holds(&prompt.text)),
            "no edge case is {what}"
        );
    };
    has("one byte", &|text| text.len() == 1);
    has("whitespace only", &|text| text.trim().is_empty());
    has("CRLF", &|text| text.contains("\r\n"));
    has("emoji with joiners", &|text| {
        text.contains("\u{1f469}\u{200d}") || text.contains("\u{200d}\u{1f680}")
    });
    has("right to left", &|text| {
        text.chars().any(|c| ('\u{590}'..='\u{6ff}').contains(&c))
    });
    has("decomposed", &|text| text.contains("e\u{301}"));
    has("composed", &|text| text.contains('\u{e9}'));
    let special = tokenizer
        .token_id("<|im_start|>")
        .expect("a special token of Qwen3");
    has("a special token", &|text| {
        tokenizer
            .encode(text)
            .is_ok_and(|tokens| tokens.contains(&special))
    });
    let lengths: Vec<usize> = edge
        .iter()
        .map(|prompt| tokenizer.encode(&prompt.text).expect("text").len())
        .collect();
    assert!(
        lengths.iter().any(|length| (560..=640).contains(length)),
        "none of some 600 tokens: {lengths:?}"
    );
    // Qwen3's tokenizer composes first, so that the pair is one and the same for the model.
    let of = |part: &str| {
        edge.iter()
            .find(|prompt| prompt.text.contains(part))
            .map(|prompt| &prompt.text)
    };
    let (composed, decomposed) = (
        of("Ang\u{e9}").expect("NFC"),
        of("Ange\u{301}").expect("NFD"),
    );
    assert_ne!(composed, decomposed);
    assert_eq!(
        tokenizer.encode(composed).expect("text"),
        tokenizer.encode(decomposed).expect("text")
    );
}
