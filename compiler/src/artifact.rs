//! The artifact: a cubin and its manifest, which is all that the runtime sees of a compilation.
//!
//! Owns the manifest's format, what it promises about its cubin, and the checks on loading. It must not open files or talk
//! to a device: bytes come in and go out.
//!
//! A kernel shares structures and sizes with the Rust that launches it, so a cubin runs only with the mirage that compiled
//! it. That is not left to version numbers: loading emits the program's source again and compares its hash.

use serde::{Deserialize, Serialize};

use crate::arch::Arch;
use crate::driver::Compilation;
use crate::emit::{CudaSource, ENTRY, cuda_source};
use crate::nvrtc::KernelResources;
use crate::program::{Program, THREADS, Violation};

/// Changes whenever the manifest's fields or their meaning do.
pub const FORMAT: u32 = 2;
/// Usual file name of the generated source, and its name in messages.
pub const SOURCE_FILE: &str = "kernel.cu";
/// Usual file name of the cubin.
pub const CUBIN_FILE: &str = "kernel.cubin";
/// Usual file name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";

/// A kernel that can be loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    /// What it is.
    pub manifest: Manifest,
    /// The binary that the driver loads.
    pub cubin: Vec<u8>,
}

/// What goes with a cubin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the mirage that wrote it.
    pub format: u32,
    /// Version of that mirage.
    pub mirage: String,
    /// Architecture of the cubin.
    pub arch: Arch,
    /// The kernel's name in the cubin.
    pub entry: String,
    /// Threads of a CTA.
    pub threads: usize,
    /// Dynamic shared memory of a CTA, in bytes.
    pub shared_bytes: usize,
    /// What it was made of, as blake3 hashes in hexadecimal digits.
    pub hashes: Hashes,
    /// Registers, spills and stack of the kernel.
    pub resources: KernelResources,
    /// The program that the kernel runs.
    pub program: Program,
}

/// blake3 hashes in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hashes {
    /// Of the graph's text.
    pub graph: String,
    /// Of the program's JSON without white space.
    pub program: String,
    /// Of `kernel.cu` and its headers: of name and text of each, each after its length in eight bytes, lowest first.
    pub source: String,
    /// Of the cubin.
    pub cubin: String,
}

/// Why a manifest or its cubin cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArtifactError {
    /// The text is no manifest.
    #[error("the manifest cannot be read: {reason}; compile the graph again")]
    Syntax {
        /// What the JSON reader said, with line and column.
        reason: String,
    },
    /// Another format.
    #[error(
        "the manifest has format {found}, this mirage {} reads format {FORMAT}; compile the graph again",
        env!("CARGO_PKG_VERSION")
    )]
    Format {
        /// The manifest's.
        found: u64,
    },
    /// The kernel's source is not what this mirage would emit.
    #[error(
        "the kernel was compiled by a mirage ({by}) whose device code is not that of this one ({}); compile the graph again",
        env!("CARGO_PKG_VERSION")
    )]
    OtherMirage {
        /// Its version.
        by: String,
    },
    /// A part of the manifest was changed after it was written.
    #[error("the manifest's {part} was changed after it was written; compile the graph again")]
    Changed {
        /// Which.
        part: &'static str,
    },
    /// The cubin is another compilation's, or damaged.
    #[error(
        "the cubin does not belong to the manifest: its blake3 hash is {found}, the manifest says {expected}; \
         copy both from one folder, or compile the graph again"
    )]
    OtherCubin {
        /// The cubin's.
        found: String,
        /// The manifest's.
        expected: String,
    },
    /// The program breaks a rule.
    #[error("the manifest's program is not well-formed: {0}")]
    Program(Violation),
}

impl Artifact {
    /// Packs a compiled kernel.
    ///
    /// # Errors
    ///
    /// A cubin without the kernel that was asked for, in words.
    pub(crate) fn new(
        of: &Compilation,
        cubin: Vec<u8>,
        resources: &[KernelResources],
    ) -> Result<Artifact, String> {
        let resources = resources
            .iter()
            .find(|kernel| kernel.name == ENTRY)
            .ok_or_else(|| format!("NVRTC reports no kernel named {ENTRY}"))?;
        let manifest = Manifest {
            format: FORMAT,
            mirage: env!("CARGO_PKG_VERSION").to_owned(),
            arch: of.target.gpu.arch,
            entry: ENTRY.to_owned(),
            threads: THREADS,
            shared_bytes: of.program.shared.bytes,
            hashes: Hashes {
                graph: hash(of.graph.source.text.as_bytes()),
                program: hash_program(&of.program),
                source: hash_source(&of.source),
                cubin: hash(&cubin),
            },
            resources: resources.clone(),
            program: of.program.clone(),
        };
        Ok(Artifact { manifest, cubin })
    }

    /// Takes a manifest's text and its cubin, and checks that they are one compilation, by this mirage.
    ///
    /// # Errors
    ///
    /// [`ArtifactError`]; the mend is always to compile again.
    pub fn load(manifest: &str, cubin: Vec<u8>) -> Result<Artifact, ArtifactError> {
        let manifest = Manifest::parse(manifest)?;
        let found = hash(&cubin);
        if found != manifest.hashes.cubin {
            return Err(ArtifactError::OtherCubin {
                found,
                expected: manifest.hashes.cubin,
            });
        }
        Ok(Artifact { manifest, cubin })
    }
}

impl Manifest {
    /// Reads a manifest and checks everything that needs no cubin.
    ///
    /// # Errors
    ///
    /// All of [`ArtifactError`] but [`ArtifactError::OtherCubin`].
    pub fn parse(text: &str) -> Result<Manifest, ArtifactError> {
        let syntax = |error: serde_json::Error| ArtifactError::Syntax {
            reason: error.to_string(),
        };
        // Another format may have other fields: its number is read before anything else is asked for.
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let Format { format } = serde_json::from_str(text).map_err(syntax)?;
        if format != u64::from(FORMAT) {
            return Err(ArtifactError::Format { found: format });
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(syntax)?;
        let program = &manifest.program;
        if hash_program(program) != manifest.hashes.program {
            return Err(ArtifactError::Changed { part: "program" });
        }
        // Only a verified program can be emitted.
        program.verify().map_err(ArtifactError::Program)?;
        if hash_source(&cuda_source(program, manifest.arch)) != manifest.hashes.source {
            return Err(ArtifactError::OtherMirage {
                by: manifest.mirage,
            });
        }
        let launch = (
            manifest.entry.as_str(),
            manifest.threads,
            manifest.shared_bytes,
        );
        if launch != (ENTRY, THREADS, program.shared.bytes) {
            return Err(ArtifactError::Changed {
                part: "entry, threads or shared_bytes",
            });
        }
        Ok(manifest)
    }

    /// The text of the manifest, to be read by [`Manifest::parse`] and by people.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self)
            .expect("numbers, strings and lists always have a JSON form");
        text.push('\n');
        text
    }
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn hash_program(program: &Program) -> String {
    hash(&serde_json::to_vec(program).expect("numbers, strings and lists always have a JSON form"))
}

fn hash_source(source: &CudaSource) -> String {
    let mut hasher = blake3::Hasher::new();
    let kernel = (SOURCE_FILE, source.text.as_str());
    let headers = source
        .headers
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()));
    for (name, text) in [kernel].into_iter().chain(headers) {
        for part in [name, text] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::GpuModel;
    use crate::driver::compile;
    use crate::plan::Target;
    use crate::typed::ModelConfig;

    /// The artifact of a small model, with a cubin that is none: nothing here runs it.
    fn artifact() -> Artifact {
        let config = include_str!("../../models/tiny/config.json");
        let config = ModelConfig::parse(config, "config.json").unwrap();
        let target = Target {
            gpu: GpuModel::default_for(Arch::Sm90a),
            batch: 2,
            max_seq: 64,
        };
        let graph = include_str!("../../graphs/qwen3.ron");
        let compilation = compile(graph, "qwen3.ron", &config, &target).unwrap();
        let kernels = ["other", ENTRY].map(|name| KernelResources {
            name: name.to_owned(),
            registers: 7,
            ..Default::default()
        });
        let none = Artifact::new(&compilation, b"cubin".to_vec(), &kernels[..1]);
        assert_eq!(none, Err(format!("NVRTC reports no kernel named {ENTRY}")));
        Artifact::new(&compilation, b"cubin".to_vec(), &kernels).unwrap()
    }

    #[test]
    fn what_was_written_is_loaded() {
        let artifact = artifact();
        assert_eq!(artifact.manifest.resources.name, ENTRY);
        let text = artifact.manifest.to_json();
        assert_eq!(Artifact::load(&text, artifact.cubin.clone()), Ok(artifact));
    }

    #[test]
    fn what_was_changed_is_refused() {
        let artifact = artifact();
        let check = |text: &str, cubin: &[u8], expect: &str| {
            let error = Artifact::load(text, cubin.to_vec())
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect), "{expect:?} is not in: {error}");
            let mend = ["compile the graph again", "please report"];
            assert!(mend.iter().any(|mend| error.contains(mend)), "{error}");
        };
        let good = artifact.manifest.to_json();
        check(&good, b"other", "the cubin does not belong to the manifest");
        check("{", b"cubin", "cannot be read: EOF");
        check("{\"format\": 1}", b"cubin", "has format 1, this mirage");
        check(
            &format!("{{\"format\": {FORMAT}}}"),
            b"cubin",
            "missing field `mirage`",
        );
        let with = |change: fn(&mut Manifest)| {
            let mut manifest = artifact.manifest.clone();
            change(&mut manifest);
            manifest
        };
        // Someone edits a number, or writes a program of their own and its hash.
        let edited = with(|manifest| manifest.program.decode.kv_splits += 1);
        check(&edited.to_json(), b"cubin", "program was changed");
        let forged = with(|manifest| {
            manifest.program.mesh.groups = 0;
            manifest.hashes.program = hash_program(&manifest.program);
        });
        check(&forged.to_json(), b"cubin", "program is not well-formed");
        let threads = with(|manifest| manifest.threads = 256);
        check(
            &threads.to_json(),
            b"cubin",
            "threads or shared_bytes was changed",
        );
        let older = with(|manifest| {
            manifest.mirage = "0.0.9".to_owned();
            manifest.hashes.source = hash(b"other device code");
        });
        check(&older.to_json(), b"cubin", "compiled by a mirage (0.0.9)");
    }
}
