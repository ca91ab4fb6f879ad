//! The committed results: readable, after the schema, and their reports made from them by the present program.

use std::fs;
use std::path::{Path, PathBuf};

use mirage_bench::report::{html, json, text};

fn folders() -> Vec<PathBuf> {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let entries = fs::read_dir(results).expect("bench/results");
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}

/// No number in a report was typed.
#[test]
fn reports_are_what_their_results_make() {
    let folders = folders();
    assert!(!folders.is_empty());
    for folder in folders {
        let file = folder.join("benchmark_results.json");
        let results = json::read(
            &fs::read_to_string(&file).unwrap(),
            &file.display().to_string(),
        )
        .unwrap();
        for (name, made) in [
            ("benchmark_report.txt", text::report(&results)),
            ("benchmark_report.html", html::page(&results)),
        ] {
            let file = folder.join(name);
            if std::env::var_os("UPDATE_RESULTS").is_some() {
                fs::write(&file, &made).expect("the report is written");
            }
            assert!(
                fs::read_to_string(&file).unwrap() == made,
                "{} is out of date: run this test with UPDATE_RESULTS=1",
                file.display()
            );
        }
    }
}

#[test]
fn results_follow_the_schema() {
    let validator = jsonschema::validator_for(&json::schema()).expect("a schema");
    for folder in folders() {
        let file = folder.join("benchmark_results.json");
        let results = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&results)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", file.display());
    }
}
