//! Graphs and config.json.

use std::str;

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::driver::{self, CompileError};
use mirage_compiler::graph::Graph;
use mirage_compiler::plan::Target;
use mirage_compiler::typed::{ModelConfig, TypedGraph};
use mirage_testing::{LLAMA3, QWEN3};

use super::refused;

/// Most parameters of a model that goes through all stages: they take a second for a billion, more than a fuzzer has.
const SMALL: u64 = 1 << 22;

pub(super) fn graph(input: &[u8]) -> bool {
    str::from_utf8(input).is_ok_and(|text| compile(text, &ModelConfig::none()))
}

pub(super) fn config(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else {
        return false;
    };
    match ModelConfig::parse(text, "config.json") {
        Ok(config) => {
            // Not lazily: both are to be tried.
            let taken = [QWEN3, LLAMA3].map(|graph| compile(graph, &config));
            taken.contains(&true)
        }
        Err(error) => {
            refused(&error);
            false
        }
    }
}

fn compile(text: &str, config: &ModelConfig) -> bool {
    let typed = Graph::parse(text, "graph.ron").and_then(|graph| TypedGraph::new(&graph, config));
    match typed {
        Ok(typed) if typed.parameters() > SMALL => return true,
        Ok(_) => {}
        Err(error) => {
            refused(&error);
            return false;
        }
    }
    let gpu = GpuModel {
        sms: 6,
        ..GpuModel::default_for(Arch::Sm90a)
    };
    let target = Target {
        gpu,
        batch: 2,
        max_seq: 256,
    };
    match driver::compile(text, "graph.ron", config, &target) {
        Ok(compilation) => {
            check_source(&compilation.source.text);
            true
        }
        Err(CompileError::Fault(fault)) => panic!("{fault}"),
        Err(error) => {
            refused(&error);
            false
        }
    }
}

/// No text of the graph stands in the source but identifiers: nothing that could end a comment, a line or a string, and no
/// number that C++ does not have.
fn check_source(text: &str) {
    for line in text.lines() {
        let plain = |c: char| c.is_ascii_graphic() || c == ' ';
        assert!(
            line.chars().all(plain) && !line.contains(['\\', '`', '$', '@']),
            "{line}"
        );
        let quotes = line.starts_with("#include \"") || line.starts_with("extern \"C\"");
        assert!(quotes || !line.contains('"'), "{line}");
        assert!(!line.contains("/*") && !line.contains("*/"), "{line}");
        for word in line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let no_number = ["inf", "inff", "NaN", "NaNf", "nan"].contains(&word);
            assert!(!no_number || line.trim_start().starts_with("//"), "{line}");
        }
    }
}
