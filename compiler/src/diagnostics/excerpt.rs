//! What an error shows of a file: its lines, but of very long ones only what is near the places that the error is about.
//!
//! Owns the cut and the way back to the file's own columns. A file that a program wrote on one line, or that is no graph at
//! all, must not flood a terminal.

use std::ops::Range;

use codespan_reporting::files::{Error, Files, SimpleFile};

use super::{Source, floor_char_boundary};

/// Longest line that is shown whole, in bytes.
const WHOLE_LINE: usize = 160;
/// Bytes shown before and after a place in a longer line.
const AROUND: usize = 40;
/// Stands for what is left out.
const GAP: char = '…';

/// A file with its long lines cut.
pub(super) struct Excerpt<'a> {
    original: &'a Source,
    cut: SimpleFile<&'a str, String>,
    /// What was kept, in order.
    pieces: Vec<Piece>,
}

/// A range of the file, and where it begins in the excerpt.
struct Piece {
    kept: Range<usize>,
    at: usize,
}

impl<'a> Excerpt<'a> {
    /// Cuts `source` but for the ends of these ranges, which lie on character boundaries.
    pub(super) fn new(source: &'a Source, places: &[Range<usize>]) -> Self {
        let mut ends: Vec<usize> = places.iter().flat_map(|p| [p.start, p.end]).collect();
        ends.sort_unstable();
        let mut text = String::new();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut keep = |text: &mut String, kept: Range<usize>| {
            pieces.push(Piece {
                kept: kept.clone(),
                at: text.len(),
            });
            text.push_str(&source.text[kept]);
        };
        let mut start = 0;
        for line in source.text.split_inclusive('\n') {
            let end = start + line.len();
            if line.len() <= WHOLE_LINE {
                keep(&mut text, start..end);
            } else {
                let content = start + line.trim_end_matches('\n').len();
                let mut next = start;
                for window in windows(source, start..content, &ends) {
                    if window.start > next {
                        text.push(GAP);
                    }
                    next = window.end;
                    keep(&mut text, window);
                }
                if next < content {
                    text.push(GAP);
                }
                keep(&mut text, content..end);
            }
            start = end;
        }
        // A place behind the last line is the end of the text.
        keep(&mut text, start..start);
        Excerpt {
            original: source,
            cut: SimpleFile::new(source.name.as_str(), text),
            pieces,
        }
    }

    /// Where a range of the file is in the excerpt.
    pub(super) fn range(&self, range: &Range<usize>) -> Range<usize> {
        self.place(range.start)..self.place(range.end)
    }

    fn place(&self, byte: usize) -> usize {
        let piece = &self.pieces[self.last_piece(|piece| piece.kept.start <= byte)];
        piece.at + byte.min(piece.kept.end) - piece.kept.start
    }

    /// Where a byte of the excerpt is in the file.
    fn origin(&self, byte: usize) -> usize {
        let piece = &self.pieces[self.last_piece(|piece| piece.at <= byte)];
        (piece.kept.start + byte - piece.at).min(piece.kept.end)
    }

    fn last_piece(&self, holds: impl FnMut(&Piece) -> bool) -> usize {
        self.pieces.partition_point(holds).saturating_sub(1)
    }
}

/// The parts of a long line that are shown: around the places in it, else its beginning.
fn windows(source: &Source, line: Range<usize>, places: &[usize]) -> Vec<Range<usize>> {
    let boundary = |byte: usize| floor_char_boundary(&source.text, byte).max(line.start);
    let first = places.partition_point(|&place| place < line.start);
    let mut windows: Vec<Range<usize>> = Vec::new();
    for &place in places[first..]
        .iter()
        .take_while(|&&place| place <= line.end)
    {
        let around =
            boundary(place.saturating_sub(AROUND))..boundary((place + AROUND).min(line.end));
        match windows.last_mut() {
            Some(last) if around.start <= last.end => last.end = around.end,
            _ => windows.push(around),
        }
    }
    if windows.is_empty() {
        windows.push(line.start..boundary(line.start + 2 * AROUND));
    }
    windows
}

impl<'a> Files<'a> for Excerpt<'a> {
    type FileId = ();
    type Name = &'a str;
    type Source = &'a str;

    fn name(&'a self, _: ()) -> Result<&'a str, Error> {
        Ok(*self.cut.name())
    }

    fn source(&'a self, _: ()) -> Result<&'a str, Error> {
        Ok(self.cut.source())
    }

    fn line_index(&'a self, id: (), byte: usize) -> Result<usize, Error> {
        self.cut.line_index(id, byte)
    }

    fn line_range(&'a self, id: (), line: usize) -> Result<Range<usize>, Error> {
        self.cut.line_range(id, line)
    }

    /// The column in the file, not that in the excerpt.
    fn column_number(&'a self, _: (), _: usize, byte: usize) -> Result<usize, Error> {
        Ok(self.original.line_column(self.origin(byte)).1)
    }
}

/// A sentence whose very long words, which can only be quotes, have lost their middle.
pub(super) fn abridge(text: &str) -> String {
    const LONGEST: usize = 160;
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let words = text.split(' ').map(|word| {
        if word.len() <= LONGEST {
            return word.to_owned();
        }
        let head = floor_char_boundary(word, AROUND);
        let tail = floor_char_boundary(word, word.len() - AROUND);
        format!("{}{GAP}{}", &word[..head], &word[tail..])
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The excerpt of a text with `<` and `>` around the place, and the marks moved into the excerpt.
    #[track_caller]
    fn check(marked: &str, expect: &str) {
        let start = marked.find('<').unwrap();
        let end = marked.find('>').unwrap() - 1;
        let source = Source {
            name: "a.ron".to_owned(),
            text: marked.replace(['<', '>'], ""),
        };
        let place = start..end;
        let excerpt = Excerpt::new(&source, std::slice::from_ref(&place));
        let shown = excerpt.range(&place);
        let mut text = excerpt.source(()).unwrap().to_owned();
        text.insert(shown.end, '>');
        text.insert(shown.start, '<');
        assert_eq!(text, expect);
        let line = excerpt.line_index((), shown.start).unwrap();
        let column = excerpt.column_number((), line, shown.start).unwrap();
        assert_eq!((line + 1, column), source.line_column(start));
    }

    #[test]
    fn long_lines_are_cut_around_the_place() {
        let [some, many] = [40, 1000].map(|n| "a".repeat(n));
        check("one\n<two>\nthree", "one\n<two>\nthree");
        check("one\ntwo<>", "one\ntwo<>");
        check(
            &format!("x\n{many}<b>{many}\nz"),
            &format!("x\n…{some}<b>{some}…\nz"),
        );
        check(&format!("<b>{many}"), &format!("<b>{some}…"));
        check(&format!("{many}<b>\n"), &format!("…{some}<b>\n"));
        check(&format!("b<{many}>c"), &format!("b<{some}…{some}>c"));
        let shown = "a".repeat(2 * AROUND);
        check(&format!("{many}\n<b>"), &format!("{shown}…\n<b>"));
        let wide = "é".repeat(500);
        check(
            &format!("{wide}<b>{wide}"),
            &format!("…{}<b>{}…", "é".repeat(20), "é".repeat(20)),
        );
    }

    #[test]
    fn long_words_are_cut_in_the_middle() {
        let sentence = "a sentence of many words ".repeat(20);
        assert_eq!(abridge(&sentence), sentence);
        let path = "/a/long/path".repeat(12);
        assert_eq!(abridge(&path), path);
        let cut = abridge(&format!("no `{}` here", "é".repeat(5000)));
        assert_eq!(
            cut,
            format!("no `{}…{}` here", "é".repeat(19), "é".repeat(20))
        );
    }
}
