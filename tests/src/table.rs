//! Tables that the measuring programs print: with lines on a terminal, in plain aligned columns elsewhere.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table as Grid, presets::UTF8_HORIZONTAL_ONLY};

/// A table of text. Columns in which every cell is a number are aligned on the right.
#[derive(Debug, Clone)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        Self {
            head: head.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as text, with a line break at its end.
    #[must_use]
    pub fn render(&self, terminal: bool) -> String {
        if terminal {
            self.with_lines()
        } else {
            self.plain()
        }
    }

    fn is_numeric(&self, column: usize) -> bool {
        let cells = || self.rows.iter().filter_map(|row| row.get(column));
        cells().next().is_some()
            && cells().all(|cell| {
                cell.starts_with(|first: char| first.is_ascii_digit() || "+-".contains(first))
            })
    }

    fn with_lines(&self) -> String {
        let mut grid = Grid::new();
        grid.load_style(UTF8_HORIZONTAL_ONLY);
        grid.set_header(&self.head);
        for row in &self.rows {
            grid.add_row(row);
        }
        for index in 0..self.head.len() {
            if self.is_numeric(index)
                && let Some(column) = grid.column_mut(index)
            {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        format!("{grid}\n")
    }

    fn plain(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let numeric: Vec<bool> = (0..widths.len())
            .map(|column| self.is_numeric(column))
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&self.head).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), numeric) in row.iter().zip(&widths).zip(&numeric) {
                // Writing to a string cannot fail.
                let _ = if *numeric {
                    write!(line, "{cell:>width$}  ")
                } else {
                    write!(line, "{cell:<width$}  ")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_aligned_and_lines_end_with_text() {
        let mut table = Table::new(&["what", "ns", "note"]);
        table.row(["a".to_owned(), "5".to_owned(), "fine".to_owned()]);
        table.row(["longer".to_owned(), "12.5".to_owned(), String::new()]);
        assert_eq!(
            table.render(false),
            "what      ns  note\na          5  fine\nlonger  12.5\n"
        );
    }

    #[test]
    fn a_terminal_gets_lines() {
        let mut table = Table::new(&["what", "ns"]);
        table.row(["a".to_owned(), "5".to_owned()]);
        assert!(table.render(true).contains('─'));
    }
}
