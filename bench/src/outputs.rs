//! The files a run writes.
//!
//! Owns when they are opened: an output that cannot be written is found out before anything is measured, and a file is
//! replaced in one step, so that a reader never sees half of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Checks that all files can be written, without changing them, and that none would be written over: by another output,
/// or one of `read`, which the run reads. Each path comes with its flag.
///
/// # Errors
/// The first that cannot be written or is there twice.
pub fn check(files: &[(&str, &Path)], read: &[(&str, &Path)]) -> Result<()> {
    for (place, (flag, file)) in files.iter().enumerate() {
        // What is no plain file (/dev/null) may take any number of texts.
        if file.exists() && !file.is_file() {
            continue;
        }
        let twice = files[..place].iter().chain(read);
        if let Some((other, _)) = twice
            .into_iter()
            .find(|(_, other)| identity(other) == identity(file))
        {
            bail!(
                "{flag} {}: {other} names the same file, and it would be overwritten; give {flag} another path",
                file.display()
            );
        }
    }
    for (_, file) in files {
        probe(file).with_context(|| {
            format!(
                "{} cannot be written; choose another path or mend its folder",
                file.display()
            )
        })?;
    }
    Ok(())
}

/// The path without links and dots, as far as it exists.
fn identity(file: &Path) -> PathBuf {
    let whole = fs::canonicalize(file);
    whole.unwrap_or_else(|_| {
        let folder = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) | None => Path::new("."),
        };
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
        folder.join(file.file_name().unwrap_or_default())
    })
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
        check(&[("--a", &old), ("--b", &new)], &[]).expect("both can be written");
        assert_eq!(fs::read_to_string(&old).expect("a file"), "kept");
        assert!(!new.exists());
        let missing = dir.path().join("none/file");
        let error = check(&[("--a", &missing)], &[]).expect_err("no such folder");
        assert!(error.to_string().contains("cannot be written"), "{error}");
        check(&[("--a", dir.path())], &[]).expect_err("a folder is no file");
    }

    #[test]
    fn no_file_is_written_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        let same = dir.path().join(".").join("new");
        fs::write(&old, "kept").expect("a file");
        let check_error = |files: &[(&str, &Path)], read: &[(&str, &Path)], words: &str| {
            let error = check(files, read).expect_err("twice the same").to_string();
            assert!(error.contains(words), "`{words}` is not in: {error}");
        };
        check_error(&[("--a", &new), ("--b", &same)], &[], "--a names the same");
        check_error(&[("--a", &old)], &[("--c", &old)], "--c names the same");
        let null = Path::new("/dev/null");
        if null.exists() {
            check(&[("--a", null), ("--b", null)], &[]).expect("it takes everything");
        }
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
