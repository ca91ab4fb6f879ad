//! Numbers that both the device library and Rust state: read from the `.cuh` files and compared.

use std::collections::BTreeMap;

use mirage_compiler::cost::WORDS_IN_FLIGHT;
use mirage_compiler::plan::Target;
use mirage_compiler::program::{
    CHOICE_BYTES, CHUNK, CONSUMER_WARPS, DRAW_BYTES, MOST_HEADS, MOST_PRODUCTS, QUEUE_BYTES,
    STRIPE, THREADS, VALUES_PER_WORD,
};

/// The constants of a header that are numbers, sums or products of what stands above them.
fn constants(header: &str) -> BTreeMap<&str, usize> {
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    for line in header.lines() {
        let Some((name, value)) = line
            .strip_prefix("constexpr int ")
            .and_then(|line| line.split_once(';'))
            .and_then(|(line, _)| line.split_once(" = "))
        else {
            continue;
        };
        let term = |term: &str| {
            let factors = term.split(" * ");
            let value = |factor: &str| factor.parse().ok().or(known.get(factor).copied());
            factors.map(value).product::<Option<usize>>()
        };
        if let Some(value) = value.split(" + ").map(term).sum::<Option<usize>>() {
            known.insert(name, value);
        }
    }
    known
}

#[track_caller]
fn check(header: &str, name: &str, expect: usize) {
    assert_eq!(constants(header).get(name), Some(&expect), "{name}");
}

#[test]
fn the_device_library_agrees() {
    let prelude = include_str!("../device/prelude.cuh");
    check(prelude, "kConsumerWarps", CONSUMER_WARPS);
    check(prelude, "kThreads", THREADS);
    let context = include_str!("../device/context.cuh");
    check(&format!("{prelude}{context}"), "kDrawBytes", DRAW_BYTES);
    let candidates = include_str!("../device/candidates.cuh");
    let candidates = format!("{prelude}{candidates}");
    check(&candidates, "kChoiceBytes", CHOICE_BYTES);
    check(&candidates, "kQueueBytes", QUEUE_BYTES);
    let words = include_str!("../device/words.cuh");
    check(words, "kValuesPerWord", VALUES_PER_WORD);
    let exchange = include_str!("../device/exchange.cuh");
    check(exchange, "kWordsInFlight", WORDS_IN_FLIGHT);
    let kv_cache = include_str!("../device/kv_cache.cuh");
    check(&format!("{prelude}{kv_cache}"), "kStripe", STRIPE);
    let attention = include_str!("../device/attention.cuh");
    check(attention, "kMostHeads", MOST_HEADS);
    let linear = include_str!("../device/linear.cuh");
    check(linear, "kMostWordColumns", Target::MAX_WORD_COLUMNS);
    let rows = include_str!("../device/rows.cuh");
    check(rows, "kBlockColumns", Target::ROW_COLUMNS);
    check(rows, "kMostProducts", MOST_PRODUCTS);
    let stream_rows = include_str!("../device/stream_rows.cuh");
    check(stream_rows, "kChunk", CHUNK);
}

#[test]
fn constants_are_read() {
    let header = "constexpr int kA = 3;\nconstexpr int kB = kA * 4 + kA;  // why\n  constexpr int kC = 1;\n\
                  constexpr int kD = f(kA);\n";
    let expect = BTreeMap::from([("kA", 3), ("kB", 15)]);
    assert_eq!(constants(header), expect);
}
