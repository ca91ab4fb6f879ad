//! The bodies: one function of bytes for each kind of input.

mod checkpoints;
mod compiler;

use std::path::PathBuf;

/// A kind of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A graph in RON, with the sizes in it: all stages up to the CUDA source.
    Graph,
    /// A config.json, for each graph that comes with the project: all stages too, where the model is small.
    Config,
    /// What begins with `{` is an index beside a good shard, everything else a safetensors file.
    Safetensors,
    /// A prompt file.
    Prompts,
    /// A tokenizer.json.
    Tokenizer,
}

/// All of them.
pub const TARGETS: [Target; 5] = [
    Target::Graph,
    Target::Config,
    Target::Safetensors,
    Target::Prompts,
    Target::Tokenizer,
];

impl Target {
    /// Its name, that of its seeds' folder.
    pub fn name(self) -> &'static str {
        match self {
            Target::Graph => "graph",
            Target::Config => "config",
            Target::Safetensors => "safetensors",
            Target::Prompts => "prompts",
            Target::Tokenizer => "tokenizer",
        }
    }

    /// The folder of its seeds.
    pub fn corpus(self) -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus")).join(self.name())
    }

    /// Gives mirage the input; whether it was taken.
    ///
    /// # Panics
    /// Where a promise is broken.
    pub fn run(self, input: &[u8]) -> bool {
        match self {
            Target::Graph => compiler::graph(input),
            Target::Config => compiler::config(input),
            Target::Safetensors => checkpoints::safetensors(input),
            Target::Prompts => prompts(input),
            Target::Tokenizer => checkpoints::tokenizer(input),
        }
    }
}

fn prompts(input: &[u8]) -> bool {
    let prompts = match mirage_bench::prompts::parse(input, "prompts.txt") {
        Ok(prompts) => prompts,
        Err(error) => {
            refused(&error);
            return false;
        }
    };
    assert!(prompts.iter().all(|prompt| !prompt.text.is_empty()));
    let categories: Vec<&str> = prompts.iter().map(|p| p.category.as_str()).collect();
    let mut order = mirage_bench::prompts::order(&categories, 1);
    order.sort_unstable();
    assert!(order.into_iter().eq(0..prompts.len()), "each once");
    mirage_bench::prompts::hash(&prompts);
    true
}

/// An error says something, and does not repeat a large input.
fn refused(error: &dyn std::fmt::Display) {
    /// Most that a terminal should get, in bytes: twenty excerpts of a few lines.
    const MOST: usize = 64 << 10;
    let text = error.to_string();
    assert!(
        !text.is_empty() && text.len() < MOST,
        "{} bytes: {text}",
        text.len()
    );
}
