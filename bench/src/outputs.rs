//! The files a run writes.
//!
//! Owns when they are opened: an output that cannot be written is found out before anything is measured, and a file is
//! replaced in one step, so that a reader never sees half of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Checks that all files can be written, without changing them.
///
/// # Errors
/// The first that cannot.
pub fn check(files: &[&Path]) -> Result<()> {
    for file in files {
        probe(file).with_context(|| {
            format!(
                "{} cannot be written; choose another path or mend its folder",
                file.display()
            )
        })?;
    }
    Ok(())
}

fn probe(file: &Path) -> io::Result<()> {
    let new = !file.exists();
    OpenOptions::new().append(true).create(true).open(file)?;
    if new {
        fs::remove_file(file)?;
    }
    Ok(())
}

/// Writes a file, by way of one beside it.
///
/// # Errors
/// The disk's.
pub fn write(file: &Path, text: &str) -> Result<()> {
    let replace = || -> io::Result<()> {
        // What is no plain file (/dev/stdout) cannot be replaced.
        if file.exists() && !file.is_file() {
            return fs::write(file, text);
        }
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part: PathBuf = file.with_file_name(name);
        fs::write(&part, text)?;
        fs::rename(&part, file).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = fs::remove_file(&part);
        })
    };
    replace().with_context(|| format!("{} cannot be written", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checking_changes_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        fs::write(&old, "kept").expect("a file");
        check(&[&old, &new]).expect("both can be written");
        assert_eq!(fs::read_to_string(&old).expect("a file"), "kept");
        assert!(!new.exists());
        let error = check(&[&dir.path().join("none/file")]).expect_err("no such folder");
        assert!(error.to_string().contains("cannot be written"), "{error}");
        check(&[dir.path()]).expect_err("a folder is no file");
    }

    #[test]
    fn writing_leaves_one_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("out");
        write(&file, "one").expect("written");
        write(&file, "two").expect("written again");
        assert_eq!(fs::read_to_string(&file).expect("a file"), "two");
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
    }
}
