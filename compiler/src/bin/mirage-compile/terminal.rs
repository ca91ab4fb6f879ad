//! What a terminal gets beyond plain text: emphasis, and a line that says what is being waited for.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};

/// Whether to emphasise; a pipe and a file get plain text.
#[derive(Clone, Copy)]
pub(crate) struct Terminal {
    styled: bool,
}

impl Terminal {
    /// Styled where stdout is a terminal that takes it and its user does not object (<https://no-color.org>).
    pub(crate) fn of_stdout() -> Terminal {
        let asked_not_to = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        Terminal {
            styled: io::stdout().is_terminal() && !asked_not_to && !dumb,
        }
    }

    /// A label.
    pub(crate) fn bold(self, text: impl fmt::Display) -> String {
        self.style("1", text)
    }

    /// What matters less.
    pub(crate) fn faint(self, text: impl fmt::Display) -> String {
        self.style("2", text)
    }

    /// What should not be.
    pub(crate) fn alarm(self, text: impl fmt::Display) -> String {
        self.style("1;31", text)
    }

    fn style(self, code: &str, text: impl fmt::Display) -> String {
        if self.styled {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }
}

/// A line on a terminal's stderr that is wiped when this is dropped.
pub(crate) struct Progress {
    shown: bool,
}

/// Says what is being waited for.
pub(crate) fn progress(text: fmt::Arguments<'_>) -> Progress {
    let mut stderr = io::stderr();
    // Progress that cannot be shown is not worth an error.
    let shown = stderr.is_terminal() && write!(stderr, "{text}").is_ok() && stderr.flush().is_ok();
    Progress { shown }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[2K");
        }
    }
}
