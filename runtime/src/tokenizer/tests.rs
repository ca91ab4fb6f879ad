//! A byte-level tokenizer built here: one token per byte, so that every character beyond ASCII is split.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const END: &str = "<|end|>";

/// Byte-level BPE writes every byte as a printable character: those that are printable Latin-1 stand for themselves,
/// the others, in order, take the characters from U+0100 on (GPT-2's table).
fn byte_characters() -> Vec<char> {
    let mut spare = 0x100..;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => spare.next().and_then(char::from_u32).unwrap(),
        })
        .collect()
}

/// Token `b` is byte `b`; 256 is "ab", 257 the special token `<|end|>`, 258 the plain added token `<think>`.
fn byte_level() -> Value {
    let mut vocab: serde_json::Map<String, Value> = byte_characters()
        .iter()
        .enumerate()
        .map(|(id, c)| (c.to_string(), json!(id)))
        .collect();
    vocab.insert("ab".into(), json!(256));
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(257, END, true), added(258, "<think>", false)],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": bytes, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["a", "b"]]},
    })
}

/// SentencePiece as Llama 2 has it: words with their space as `▁`, and bytes for what has no token.
fn byte_fallback() -> Value {
    let mut vocab = json!({"▁a": 256, "▁b": 257, "<unk>": 258});
    for byte in 0..256 {
        vocab[format!("<0x{byte:02X}>")] = json!(byte);
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    })
}

fn open(json: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), json.to_string()).unwrap();
    Tokenizer::open(dir.path()).unwrap()
}

#[test]
fn encodes_and_decodes_every_byte() {
    let tokenizer = open(&byte_level());
    for text in ["abc", "é 你好 🙂\n", ""] {
        assert_eq!(
            tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(),
            text
        );
    }
    // The file's truncation to four tokens does not count.
    assert_eq!(tokenizer.encode("abcdefgh").unwrap().len(), 7);
    assert_eq!(tokenizer.encode("é").unwrap(), [0xc3, 0xa9]);
    assert_eq!(tokenizer.vocabulary(), 259);
}

#[test]
fn special_tokens_are_encoded_from_text_and_left_out_of_it() {
    let tokenizer = open(&byte_level());
    let tokens = tokenizer.encode("x<|end|><think>").unwrap();
    assert_eq!(tokens, [u32::from(b'x'), 257, 258]);
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "x<think>");
    assert_eq!(tokenizer.token_id(END), Some(257));
    assert_eq!(
        tokenizer.decode(&[120, 9999]).unwrap(),
        "x",
        "ids beyond the tokenizer are left out"
    );
}

#[test]
fn post_processor_adds_its_tokens() {
    let mut json = byte_level();
    json["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END: {"id": END, "ids": [257], "tokens": [END]}}});
    assert_eq!(open(&json).encode("x").unwrap(), [257, u32::from(b'x')]);
}

/// Streams `tokens`; `expect` are the pieces, the last of them from `finish`.
fn check_stream(tokenizer: &Tokenizer, tokens: &[u32], expect: &[&str]) {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = tokens
        .iter()
        .map(|token| stream.push(*token).unwrap())
        .collect();
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces, expect, "{tokens:x?}");
}

#[test]
fn stream_holds_back_split_characters() {
    let tokenizer = open(&byte_level());
    let check = |tokens: &[u32], expect: &[&str]| check_stream(&tokenizer, tokens, expect);
    check(&[], &[""]);
    check(&[256, 0x63], &["ab", "c", ""]);
    // 🙂 is f0 9f 99 82.
    check(
        &[0x61, 0xf0, 0x9f, 0x99, 0x82, 0x62],
        &["a", "", "", "", "🙂", "b", ""],
    );
    check(&[0xc3, 0xa9, 0xc3, 0xa9], &["", "é", "", "é", ""]);
    // A character that never becomes whole: as soon as the next byte shows it, and at the end.
    check(&[0xc3, 0x61], &["", "\u{fffd}a", ""]);
    check(&[0x61, 0xf0, 0x9f], &["a", "", "", "\u{fffd}"]);
    // A special token says nothing.
    check(&[0x61, 257, 0x62], &["a", "", "b", ""]);
    check(&[257, 258], &["", "<think>", ""]);
}

#[test]
fn stream_keeps_spaces_that_depend_on_neighbours() {
    let tokenizer = open(&byte_fallback());
    check_stream(&tokenizer, &[256, 257, 256], &["a", " b", " a", ""]);
    check_stream(
        &tokenizer,
        &[256, 0xc3, 0xa9, 257],
        &["a", "", "é", " b", ""],
    );
    check_stream(
        &tokenizer,
        &[0xf0, 0x9f, 0x99, 0x82],
        &["", "", "", "🙂", ""],
    );
}

#[test]
fn stream_survives_what_byte_fallback_revokes() {
    let tokenizer = open(&byte_fallback());
    // The run c3 a9 ff is no UTF-8, so decoded as a whole it is three replacement characters; é is out by then.
    check_stream(
        &tokenizer,
        &[0xc3, 0xa9, 0xff, 256],
        &["", "é", "", "\u{fffd}\u{fffd}\u{fffd} a", ""],
    );
}

#[test]
fn stream_of_any_bytes_equals_decoding_at_once() {
    let tokenizer = open(&byte_level());
    // A linear congruential generator is random enough; most of its bytes are no UTF-8. Then long runs of lead bytes,
    // continuation bytes and special tokens, which outlast the window.
    let random = (0..4096u32).scan(1u32, |state, _| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 24) % 258)
    });
    let runs = [0xc3, 0x82, 257, 0xf0, 0x61]
        .into_iter()
        .flat_map(|token| [token; 100]);
    for tokens in [random.collect::<Vec<_>>(), runs.collect()] {
        let mut stream = tokenizer.stream();
        let mut text: String = tokens
            .iter()
            .map(|token| stream.push(*token).unwrap())
            .collect();
        // A longer window would mean that a step's cost grows with the text.
        assert!(stream.window.len() <= 32);
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&tokens).unwrap());
    }
}

#[test]
fn missing_and_malformed_files() {
    let dir = tempfile::tempdir().unwrap();
    let message = |dir: &TempDir| {
        Tokenizer::open(dir.path())
            .unwrap_err()
            .to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    };
    assert_eq!(
        message(&dir),
        "DIR: the folder has no tokenizer.json; copy it from where the weights came from, or make it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
    );
    fs::write(dir.path().join(FILE), "{").unwrap();
    assert_eq!(
        message(&dir),
        "DIR/tokenizer.json: not a tokenizer that can be loaded (EOF while parsing an object at line 1 column 1); download it again"
    );
}

/// `stop_tokens` of a folder with this generation_config.json (none where `None`) and this config; errors as text.
fn stop_tokens_of(generation: Option<&str>, config: Value) -> Result<Vec<u32>, String> {
    let dir = tempfile::tempdir().unwrap();
    if let Some(text) = generation {
        fs::write(dir.path().join("generation_config.json"), text).unwrap();
    }
    stop_tokens(dir.path(), config.as_object().unwrap()).map_err(|e| {
        e.to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    })
}

#[test]
fn stop_tokens_prefer_the_generation_config() {
    let config = || json!({"eos_token_id": 7});
    let check = |generation, config, expect: &[u32]| {
        assert_eq!(stop_tokens_of(generation, config).unwrap(), expect)
    };
    check(Some(r#"{"eos_token_id": [9, 3, 9]}"#), config(), &[3, 9]);
    check(Some(r#"{"eos_token_id": 5}"#), config(), &[5]);
    check(Some(r#"{"eos_token_id": null}"#), config(), &[7]);
    check(Some("{}"), config(), &[7]);
    check(None, config(), &[7]);
    check(None, json!({}), &[]);
}

#[test]
fn malformed_stop_tokens() {
    let check = |generation, config, expect: &str| {
        assert_eq!(stop_tokens_of(generation, config).unwrap_err(), expect)
    };
    check(
        Some("{"),
        json!({}),
        "DIR/generation_config.json: not the JSON it should be (EOF while parsing an object at line 1 column 1); mend the file or download it again",
    );
    check(
        Some(r#"{"eos_token_id": -1}"#),
        json!({}),
        "DIR/generation_config.json: eos_token_id is -1, but must be a token id (0 to 4294967295) or a list of them; write the id of the tokenizer's end token",
    );
    check(
        None,
        json!({"eos_token_id": ["</s>"]}),
        "DIR/config.json: eos_token_id is [\"</s>\"], but must be a token id (0 to 4294967295) or a list of them; write the id of the tokenizer's end token",
    );
}
