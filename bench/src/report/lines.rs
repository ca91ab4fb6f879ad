//! Lines of a text report under construction.

use std::fmt::Write as _;

use crate::stats::Estimate;

/// Characters of a line.
pub(super) const WIDTH: usize = 100;

/// Lines under construction.
pub(super) struct Text(pub(super) String);

impl Text {
    pub(super) fn line(&mut self, text: &str) {
        self.0.push_str(text.trim_end());
        self.0.push('\n');
    }

    pub(super) fn rule(&mut self, of: char) {
        self.line(&String::from(of).repeat(WIDTH));
    }

    pub(super) fn section(&mut self, title: &str) {
        self.line(title);
        self.rule('-');
    }

    pub(super) fn interval(&mut self, width: usize, estimate: &Estimate) {
        if let Some((low, high)) = estimate.interval {
            let mut line = String::new();
            // Writing to a String cannot fail.
            let _ = write!(line, "    {:<width$} {low:.3}x to {high:.3}x", "95 %:");
            self.line(&line);
        }
    }

    /// A paragraph broken at the width, further lines indented by two.
    pub(super) fn wrapped(&mut self, head: &str, text: &str) {
        let mut line = head.to_owned();
        let mut fresh = true;
        for word in text.split_whitespace() {
            if !fresh && line.chars().count() + 1 + word.chars().count() > WIDTH {
                self.line(&line);
                line = "  ".to_owned();
                fresh = true;
            }
            if !fresh {
                line.push(' ');
            }
            line.push_str(word);
            fresh = false;
        }
        self.line(&line);
    }
}
