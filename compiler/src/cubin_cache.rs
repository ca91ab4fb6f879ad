//! Cubins kept on disk, so that a program is compiled once per machine.
//!
//! Owns the folder, the key, and the entries' format. It must not decide what is
//! compiled, and it must never be the reason that a compilation fails: trouble with
//! the disk is reported beside a freshly compiled result.
//!
//! Like [`crate::nvrtc`] this stands after the stages, none of which does any IO.
//!
//! - **Key**: blake3 over the source, its headers, every NVRTC option (the architecture is
//!   one), and NVRTC's version, each with its length. Same key, same cubin.
//! - **Folder**: `cubins` in `MIRAGE_CACHE_DIR`, else in `$XDG_CACHE_HOME/mirage`, else in
//!   `~/.cache/mirage`; made private (0700). A folder that somebody else owns or can write
//!   to is refused: a cubin is code that we run.
//! - **Entries** are written to a temporary file and renamed, so readers see whole entries
//!   or none, whoever else compiles at the same time. Each carries the hash of its content;
//!   one that does not match is compiled again and replaced. So is one that is a link, that
//!   somebody else owns or can write to, or that is too large for a cubin: a folder may have
//!   been open to others before it was private. Any of them may be deleted at any time.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arch::Arch;
use crate::input;
use crate::nvrtc::{Compiled, KernelResources, Nvrtc, NvrtcError, Options, Source};

/// Changes whenever the key or the entries' format does.
const FORMAT: &str = "mirage cubin 1";

/// Largest entry that is read, in bytes. Entries have some hundred KB.
const MAX_ENTRY: usize = 64 << 20;

/// Bytes of a blake3 hash.
const HASH: usize = blake3::OUT_LEN;

/// A folder of compiled programs.
#[derive(Clone, Debug)]
pub struct CubinCache {
    folder: PathBuf,
}

/// A compiled program and how it was come by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The same, whether it was compiled or read.
    pub compiled: Compiled,
    /// It was read from the cache.
    pub hit: bool,
    /// Why the result could not be kept, in words; the result itself is good.
    pub not_kept: Option<String>,
}

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// No folder is named by the environment.
    #[error(
        "no cache folder: none of MIRAGE_CACHE_DIR, XDG_CACHE_HOME and HOME is set; set MIRAGE_CACHE_DIR"
    )]
    NoFolder,
    /// The folder cannot be made or looked at.
    #[error("cache folder {}: {error}; set MIRAGE_CACHE_DIR to a folder you can write to", .folder.display())]
    Io {
        /// Which.
        folder: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others could plant code in it.
    #[error(
        "cache folder {} belongs to, or can be written by, another user; chmod 700 it, or set MIRAGE_CACHE_DIR to a folder of yours",
        .folder.display()
    )]
    NotPrivate {
        /// Which.
        folder: PathBuf,
    },
}

impl CubinCache {
    /// The cache of the current user, made if it is not there.
    ///
    /// # Errors
    ///
    /// [`CacheError`]: a caller goes on without a cache.
    pub fn open() -> Result<CubinCache, CacheError> {
        let set = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = set("MIRAGE_CACHE_DIR")
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("mirage")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/mirage")))
            .ok_or(CacheError::NoFolder)?;
        CubinCache::at(home.join("cubins"))
    }

    /// A cache in this folder, made private if it is not there.
    ///
    /// # Errors
    ///
    /// [`CacheError::Io`], [`CacheError::NotPrivate`].
    pub fn at(folder: PathBuf) -> Result<CubinCache, CacheError> {
        let look = || {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)?;
            fs::metadata(&folder)
        };
        match look() {
            Err(error) => Err(CacheError::Io { folder, error }),
            Ok(meta) if !is_private(&meta) => Err(CacheError::NotPrivate { folder }),
            Ok(_) => Ok(CubinCache { folder }),
        }
    }

    /// The compiled program: read where it is kept, else compiled and kept.
    ///
    /// # Errors
    ///
    /// Those of [`Nvrtc::compile`] only.
    pub fn compile(
        &self,
        nvrtc: &Nvrtc,
        source: &Source,
        arch: Arch,
        options: &Options,
    ) -> Result<Fetched, NvrtcError> {
        let path = self
            .folder
            .join(format!("{}.cubin", key(nvrtc, source, arch, options)));
        // A missing entry and an unreadable or damaged one mend alike: by compiling.
        if let Some(compiled) = entry(&path).as_deref().and_then(decode) {
            return Ok(Fetched {
                compiled,
                hit: true,
                not_kept: None,
            });
        }
        let compiled = nvrtc.compile(source, arch, options)?;
        let not_kept = self.keep(&path, &encode(&compiled)).err();
        let not_kept = not_kept.map(|error| format!("{} was not written: {error}", path.display()));
        Ok(Fetched {
            compiled,
            hit: false,
            not_kept,
        })
    }

    fn keep(&self, path: &Path, entry: &[u8]) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(entry)?;
        file.persist(path)?;
        Ok(())
    }
}

/// Whether it is this user's, and nobody else can write to it.
fn is_private(meta: &fs::Metadata) -> bool {
    meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o022 == 0
}

/// The bytes of an entry; `None` where there is none that can be trusted. Nobody else can exchange it meanwhile: the folder
/// is private.
fn entry(path: &Path) -> Option<Vec<u8>> {
    let meta = fs::symlink_metadata(path).ok()?;
    if !meta.is_file() || !is_private(&meta) {
        return None;
    }
    input::read(path, MAX_ENTRY).ok()
}

/// Compiles with what this machine has: the NVRTC that is found, through the user's cache
/// where there can be one.
///
/// # Errors
///
/// Those of [`Nvrtc::find`] and [`Nvrtc::compile`].
pub fn fetch(source: &Source, arch: Arch, options: &Options) -> Result<Fetched, NvrtcError> {
    let nvrtc = Nvrtc::find()?;
    match CubinCache::open() {
        Ok(cache) => cache.compile(&nvrtc, source, arch, options),
        Err(error) => {
            let compiled = nvrtc.compile(source, arch, options)?;
            Ok(Fetched {
                compiled,
                hit: false,
                not_kept: Some(error.to_string()),
            })
        }
    }
}

/// Names everything that the cubin depends on.
fn key(nvrtc: &Nvrtc, source: &Source, arch: Arch, options: &Options) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    // With lengths and counts, no two different inputs read as the same bytes.
    let mut part = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    let (major, minor) = nvrtc.version();
    part(FORMAT);
    part(&format!("nvrtc {major}.{minor}"));
    let arguments = options.arguments(arch, (major, minor));
    part(&arguments.len().to_string());
    for argument in &arguments {
        part(argument);
    }
    part(&source.name);
    part(&source.text);
    for (name, text) in &source.headers {
        part(name);
        part(text);
    }
    hasher.finalize()
}

/// What an entry holds besides the two binaries.
#[derive(Serialize, Deserialize)]
struct Header {
    cubin_bytes: usize,
    ptx_bytes: Option<usize>,
    log: String,
    resources: Vec<KernelResources>,
}

/// An entry: hash of all that follows, length of the header, header (JSON), cubin, PTX.
fn encode(compiled: &Compiled) -> Vec<u8> {
    let header = Header {
        cubin_bytes: compiled.cubin.len(),
        ptx_bytes: compiled.ptx.as_ref().map(Vec::len),
        log: compiled.log.clone(),
        resources: compiled.resources.clone(),
    };
    let header = serde_json::to_vec(&header).expect("strings and integers always have a JSON form");
    let mut entry = vec![0; HASH];
    entry.extend((header.len() as u64).to_le_bytes());
    entry.extend(header);
    entry.extend(&compiled.cubin);
    entry.extend(compiled.ptx.iter().flatten());
    let hash = blake3::hash(&entry[HASH..]);
    entry[..HASH].copy_from_slice(hash.as_bytes());
    entry
}

/// The program an entry holds; `None` where it is damaged.
fn decode(entry: &[u8]) -> Option<Compiled> {
    let (hash, content) = entry.split_first_chunk::<HASH>()?;
    if blake3::hash(content) != *hash {
        return None;
    }
    let (length, rest) = content.split_first_chunk()?;
    let (header, binaries) =
        rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Header = serde_json::from_slice(header).ok()?;
    let (cubin, ptx) = binaries.split_at_checked(header.cubin_bytes)?;
    if ptx.len() != header.ptx_bytes.unwrap_or(0) {
        return None;
    }
    Some(Compiled {
        cubin: cubin.to_vec(),
        ptx: header.ptx_bytes.map(|_| ptx.to_vec()),
        log: header.log,
        resources: header.resources,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn compiled(ptx: Option<&[u8]>) -> Compiled {
        Compiled {
            cubin: b"\x7fELF cubin".to_vec(),
            ptx: ptx.map(<[u8]>::to_vec),
            log: "a \"warning\"".to_owned(),
            resources: vec![KernelResources {
                name: "k".to_owned(),
                registers: 9,
                ..Default::default()
            }],
        }
    }

    #[test]
    fn entries_round_trip() {
        for ptx in [None, Some(&b""[..]), Some(b".version 9.0")] {
            assert_eq!(decode(&encode(&compiled(ptx))), Some(compiled(ptx)));
        }
    }

    #[test]
    fn every_damage_is_noticed() {
        let entry = encode(&compiled(Some(b"ptx")));
        for at in 0..entry.len() {
            let mut damaged = entry.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged), None, "flipped byte {at}");
            assert_eq!(decode(&entry[..at]), None, "cut at {at}");
        }
        assert_eq!(decode(&[&entry[..], b"x"].concat()), None);
    }

    #[test]
    fn entries_of_others_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.cubin");
        fs::write(&path, "ours").unwrap();
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        for (bits, trusted) in [(0o600, true), (0o644, true), (0o664, false), (0o602, false)] {
            mode(bits);
            assert_eq!(entry(&path).is_some(), trusted, "{bits:o}");
        }
        mode(0o600);
        let link = folder.path().join("link.cubin");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(entry(&link), None);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(MAX_ENTRY as u64 + 1)
            .unwrap();
        assert_eq!(entry(&path), None);
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("new/cubins");
        CubinCache::at(folder.clone()).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = CubinCache::at(folder).unwrap_err();
        assert!(
            matches!(refused, CacheError::NotPrivate { .. }),
            "{refused}"
        );
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = CubinCache::at(file.join("cubins")).unwrap_err();
        assert!(matches!(refused, CacheError::Io { .. }), "{refused}");
    }
}
