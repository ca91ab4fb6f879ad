//! The reports of a run that never was: a GPU with a ladder of baselines, whose times are made up but whose results are
//! derived as any run's.

use std::path::Path;

use super::{html, json, markdown, text};
use crate::derive;
use crate::external;
use crate::harness::tests::{Fake, model, run, schedule};
use crate::results::{
    Configuration, DeviceFacts, DeviceKind, DeviceState, PromptFacts, Results, SCHEMA_VERSION,
    Sample, Skipped,
};
use crate::side::Side as _;

/// Batches 1, 2 and 4 on mirage and three baselines of which one has no room for a batch of 4.
pub(crate) fn results() -> Results {
    let fakes = || {
        [
            Fake {
                prefill: 0.0001,
                ..Fake::new("mirage", 0.0011)
            },
            Fake {
                room: 2,
                ..Fake::new("b0", 0.004)
            },
            Fake::new("b1", 0.0023),
            Fake::new("b2", 0.0016),
        ]
    };
    let mut sides = fakes().map(Fake::boxed);
    let measured = run(&schedule(&[1, 2, 4], 1, 3), &mut sides);
    let state = |clock| DeviceState {
        sm_clock_mhz: Some(clock),
        temperature_c: Some(41.0),
        throttle_reasons: Some("0x0".to_owned()),
        ..DeviceState::default()
    };
    let mut results = Results {
        schema_version: SCHEMA_VERSION,
        generator: "mirage-bench 0.0.0".to_owned(),
        generated: "2026-01-02T03:04:05+00:00".to_owned(),
        complete: measured.complete,
        ended_early: None,
        device: DeviceFacts {
            kind: DeviceKind::Cuda,
            name: "Made-up GPU".to_owned(),
            driver: Some("1.2.3".to_owned()),
            memory_mib: Some(1024),
            host_cpu: "Made-up CPU".to_owned(),
            host_threads: 4,
            os: "linux x86_64".to_owned(),
            bandwidth_gb_s: Some(1.0),
            before: Some(state(1980.0)),
            after: Some(state(1500.0)),
            warnings: vec!["the SM clock moved from 1980 to 1500 MHz during the run".to_owned()],
        },
        model: model(),
        configuration: Configuration {
            max_tokens: 11,
            temperature: 0.0,
            top_p: 1.0,
            num_warmup: 1,
            num_iterations: 3,
            batch_sizes: vec![1, 2, 4],
            context_depths: Vec::new(),
            seed: 0,
            ignore_eos: true,
        },
        prompts: PromptFacts {
            file: "prompts.txt".to_owned(),
            categories: Vec::new(),
            hash: "0123456789abcdef0123".to_owned(),
            count: 3,
            skipped: vec![Skipped {
                prompt: "b/2".to_owned(),
                reason: "it is too long".to_owned(),
            }],
        },
        sides: fakes().iter().map(|fake| fake.facts()).collect(),
        points: measured.points,
        summary: Vec::new(),
        sample: Some(Sample {
            prompt: "<b>Once</b>".to_owned(),
            text: " upon & a time\n".to_owned(),
        }),
        notes: vec!["Nothing here was measured.".to_owned()],
    };
    results.summary = derive::summary(&results);
    let other = r#"{"format": "mirage-external", "version": 1, "engine": "Other", "description": "graphs", "device": "Made-up GPU",
        "points": [{"batch": 1, "iterations": [{"latency_ms": 40.0, "tokens": 11, "ttft_ms": 3.0}]}]}"#;
    match external::read(other, "other.json") {
        Ok(other) => other.add_to(&mut results),
        Err(error) => panic!("{error}"),
    }
    results
}

#[test]
fn the_text_report_has_the_guides_layout() {
    insta::assert_snapshot!(text::report(&results()));
}

#[test]
fn the_table_to_paste() {
    insta::assert_snapshot!(markdown::table(&results()));
}

#[test]
fn the_page_has_every_chart_and_stands_alone() {
    let page = html::page(&results());
    if let Some(file) = std::env::var_os("WRITE_PAGE") {
        std::fs::write(Path::new(&file), &page).expect("the page is written");
    }
    for title in [
        "Latency of a batch",
        "Throughput",
        "Time to first token",
        "Mirage against b1",
        "Share of the roofline",
        "From baseline to mirage, batch 1",
    ] {
        assert!(
            page.contains(&format!("<h3>{title}")),
            "there is no {title}"
        );
    }
    assert!(page.contains("&lt;b&gt;Once&lt;/b&gt;") && !page.contains("<b>Once"));
    assert!(page.contains("Not measured: b0: batch 4 needs too much memory"));
    assert!(page.contains("Other (external)"));
    for forbidden in [
        "NaN", "inf\"", "<script", "href=", "src=", "http:", "https:",
    ] {
        assert!(!page.contains(forbidden), "`{forbidden}` is in the page");
    }
}

#[test]
fn results_survive_their_file() {
    let results = results();
    let file = json::write(&results).expect("JSON");
    let again = json::read(&file, "results.json").expect("our own file");
    assert_eq!(json::write(&again).expect("JSON"), file);
    let error = json::read(
        &file.replacen(
            &format!("\"schema_version\": {SCHEMA_VERSION}"),
            "\"schema_version\": 77",
            1,
        ),
        "old.json",
    )
    .expect_err("another version");
    assert!(
        error.to_string().contains("old.json") && error.to_string().contains("77"),
        "{error}"
    );
}
