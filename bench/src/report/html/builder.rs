//! A page under construction.

use std::fmt::Write as _;

use crate::report::svg::escape;

/// The text of a page.
pub(super) struct Html(pub(super) String);

impl Html {
    /// Texts must be escaped by the caller.
    pub(super) fn push(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.0.write_fmt(arguments);
    }

    pub(super) fn figure(&mut self, title: &str, chart: &str, caption: &str) {
        self.push(format_args!(
            "<figure><h3>{}</h3>{chart}<figcaption>{}</figcaption></figure>\n",
            escape(title),
            escape(caption)
        ));
    }

    pub(super) fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        self.push(format_args!("<div class=\"wide\"><table><thead><tr>"));
        for cell in head {
            self.push(format_args!("<th scope=\"col\">{}</th>", escape(cell)));
        }
        self.push(format_args!("</tr></thead><tbody>\n"));
        for row in rows {
            self.push(format_args!("<tr>"));
            for cell in row {
                self.push(format_args!("<td>{}</td>", escape(cell)));
            }
            self.push(format_args!("</tr>\n"));
        }
        self.push(format_args!("</tbody></table></div>\n"));
    }
}
