//! What commands print: tables with lines and colour on a terminal, plain aligned columns in a pipe,
//! JSON for programs.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    os::fd::AsRawFd,
};

use anstyle::{AnsiColor, Style};
use comfy_table::{
    ColumnConstraint, ContentArrangement, LineStyle, Table as Grid, TableStyle, Width,
};
use jiff::Timestamp;
use serde::Serialize;

use super::exit::Failure;

/// A rule below the head, and no other lines.
const LOOK: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// Blanks behind a cell, besides the one between two columns.
const GAP: u16 = 1;

/// Words up to this length are not broken to save room.
const LONG_WORD: usize = 22;

/// How a text is meant; shown by colour on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    /// As it should be.
    Good,
    /// To be noticed.
    Notice,
    /// Wrong.
    Bad,
    /// Structure rather than content.
    Head,
}

impl Tone {
    const ALL: [Tone; 4] = [Tone::Good, Tone::Notice, Tone::Bad, Tone::Head];

    fn style(self) -> Style {
        match self {
            Tone::Good => Style::new().fg_color(Some(AnsiColor::Green.into())),
            Tone::Notice => Style::new().bold().fg_color(Some(AnsiColor::Yellow.into())),
            Tone::Bad => Style::new().bold().fg_color(Some(AnsiColor::Red.into())),
            Tone::Head => Style::new().bold(),
        }
    }

    /// A character without width that stands for the style while a table is laid out, so that escape
    /// sequences do not count as width (the invisible operators U+2061 to U+2064).
    fn marker(self) -> char {
        match self {
            Tone::Good => '\u{2061}',
            Tone::Notice => '\u{2062}',
            Tone::Bad => '\u{2063}',
            Tone::Head => '\u{2064}',
        }
    }
}

/// Ends what a marker began (U+2060, word joiner).
const END: char = '\u{2060}';

/// A text with a tone: on a terminal it gets its colour when it is printed.
#[must_use]
pub(super) fn toned(tone: Tone, text: &str) -> String {
    format!("{}{text}{END}", tone.marker())
}

/// How to print, decided once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    /// JSON instead of text.
    pub(super) json: bool,
    /// Standard output is a terminal.
    pub(super) terminal: bool,
    /// Its width in columns, if it is one.
    width: Option<u16>,
}

impl Output {
    /// Looks at standard output.
    #[must_use]
    pub(super) fn new(json: bool) -> Output {
        // One without cursor movement is no terminal for us (terminfo's `dumb`).
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = io::stdout().is_terminal() && !dumb;
        Output {
            json,
            terminal,
            width: terminal.then(terminal_width).flatten(),
        }
    }

    /// Output into a pipe, as tests want it.
    #[cfg(test)]
    pub(super) fn plain() -> Output {
        Output {
            json: false,
            terminal: false,
            width: None,
        }
    }

    /// Prints the document with `--json`, else the text.
    pub(super) fn either(
        self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json {
            print_document(value)
        } else {
            print(&text())
        }
    }

    /// Lays a table out.
    #[must_use]
    pub(super) fn table(self, table: &Table) -> String {
        if self.terminal {
            table.grid(self.width)
        } else {
            table.plain()
        }
    }
}

/// A text with its tones where standard output shows colour, for what prints by itself.
#[must_use]
pub(super) fn for_stdout(text: &str) -> String {
    let text = coloured(text);
    match anstream::AutoStream::choice(&io::stdout()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(&text).to_string(),
        _ => text,
    }
}

/// Prints text, with its tones where standard output shows colour.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = anstream::stdout().lock();
    stdout
        .write_all(coloured(text).as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::output(&error))
}

/// Prints a document on one line.
pub(super) fn print_document(value: &impl Serialize) -> Result<(), Failure> {
    let write = || -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        let mut stdout = io::stdout().lock();
        stdout.write_all(&text)?;
        stdout.flush()
    };
    write().map_err(|error| Failure::output(&error))
}

/// Says something on standard error: progress, warnings.
pub(super) fn say(text: &str) {
    // If nobody listens there any more there is nobody to tell.
    let _ = writeln!(anstream::stderr(), "{}", coloured(text));
}

/// Warns on standard error.
pub(super) fn warn(text: &str) {
    say(&format!("{} {text}", toned(Tone::Notice, "warning:")));
}

/// Prints a failure: `error: …`, its causes indented, and `help: …`.
pub(super) fn report(failure: &Failure, json: bool) {
    if failure.silent {
        return;
    }
    if json {
        // Nothing can be said about output that fails.
        let _ = writeln!(io::stdout(), "{}", failure.to_json());
    }
    let mut text = format!("{} {}", toned(Tone::Bad, "error:"), failure.message);
    for cause in &failure.causes {
        let _ = write!(text, "\n  {cause}");
    }
    if let Some(help) = &failure.help {
        let _ = write!(text, "\n{} {help}", toned(Tone::Good, "help:"));
    }
    say(&text);
}

/// Tones become escape sequences, which the stream drops where they are not wanted.
pub(super) fn coloured(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut open: Option<Style> = None;
    for c in text.chars() {
        if c == END {
            if let Some(style) = open.take() {
                let _ = write!(shown, "{style:#}");
            }
        } else if let Some(tone) = Tone::ALL.into_iter().find(|tone| tone.marker() == c) {
            let style = tone.style();
            let _ = write!(shown, "{style}");
            open = Some(style);
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Text without its tones.
pub(super) fn bare(text: &str) -> String {
    let marker = |c: char| c == END || Tone::ALL.iter().any(|tone| tone.marker() == c);
    text.chars().filter(|&c| !marker(c)).collect()
}

fn terminal_width() -> Option<u16> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize to the address given, which is that of `size`.
    let rc = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (rc == 0 && size.ws_col > 0).then_some(size.ws_col)
}

/// A table: a head and rows of as many cells.
#[derive(Debug, Clone)]
pub(super) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    /// Columns that are left out where they hold nothing but zeros.
    rare: &'static [&'static str],
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub(super) fn new(head: &[&'static str]) -> Table {
        Table {
            head: head.to_vec(),
            rows: Vec::new(),
            rare: &[],
        }
    }

    /// The same, without those of these columns that hold nothing but zeros: what hardly ever happens
    /// takes no room until it does.
    #[must_use]
    pub(super) fn sparing(mut self, rare: &'static [&'static str]) -> Table {
        self.rare = rare;
        self
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The head and the rows without the columns that are left out.
    fn shown(&self) -> (Vec<&'static str>, Vec<Vec<&String>>) {
        let shown: Vec<bool> = (0..)
            .zip(&self.head)
            .map(|(column, name)| {
                let zero = |row: &Vec<String>| row.get(column).is_none_or(|cell| cell == "0");
                !(self.rare.contains(name) && self.rows.iter().all(zero))
            })
            .collect();
        let keep = |index: usize| shown.get(index).copied().unwrap_or(true);
        let head = self.head.iter().enumerate();
        let rows = self.rows.iter().map(|row| {
            let cells = row.iter().enumerate();
            cells.filter(|(i, _)| keep(*i)).map(|(_, c)| c).collect()
        });
        (
            head.filter(|(i, _)| keep(*i)).map(|(_, n)| *n).collect(),
            rows.collect(),
        )
    }

    /// For terminals: rules between head and rows, and cells wrapped to the width.
    fn grid(&self, width: Option<u16>) -> String {
        let (head, rows) = self.shown();
        let rows: Vec<Vec<String>> = rows
            .iter()
            .map(|row| row.iter().map(|cell| breakable(cell)).collect())
            .collect();
        let mut grid = Grid::new();
        grid.load_style(LOOK);
        if let Some(width) = width {
            grid.set_content_arrangement(ContentArrangement::Dynamic)
                .set_width(width);
        }
        grid.set_header(head.iter().map(|name| toned(Tone::Head, name)));
        for row in &rows {
            grid.add_row(row);
        }
        for (index, column) in grid.column_iter_mut().enumerate() {
            column.set_padding((0, GAP));
            let words = rows
                .iter()
                .filter_map(|row| row.get(index))
                .flat_map(|cell| cell.split_whitespace())
                .map(|word| bare(word).chars().count())
                .filter(|length| *length <= LONG_WORD);
            let least = words.chain(head.get(index).map(|name| name.len())).max();
            let least = u16::try_from(least.unwrap_or(0)).unwrap_or(u16::MAX);
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(
                least.saturating_add(GAP),
            )));
        }
        grid.lines().fold(String::new(), |text, line| {
            text + line.trim_end_matches(' ') + "\n"
        })
    }

    /// For pipes: columns two blanks apart, nothing after the last cell, no tones.
    fn plain(&self) -> String {
        let (head, rows) = self.shown();
        let head: Vec<String> = head.iter().map(ToString::to_string).collect();
        let head: Vec<&String> = head.iter().collect();
        // A cell may hold several lines on a terminal.
        let bare = |cell: &&String| bare(cell).replace('\n', "; ");
        let lines: Vec<Vec<String>> = std::iter::once(&head)
            .chain(&rows)
            .map(|row| row.iter().map(bare).collect())
            .collect();
        let mut widths = vec![0; head.len()];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for line in &lines {
            let mut shown = String::new();
            for (width, cell) in widths.iter().zip(line) {
                let _ = write!(shown, "{cell:<width$}  ");
            }
            text.push_str(shown.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Lists that are too long for a line, `10.0.0.1,10.0.0.2,…`, with blanks at which they can be broken.
fn breakable(cell: &str) -> String {
    let words = cell.split(' ').map(|word| {
        if bare(word).chars().count() > LONG_WORD && !word.contains('{') {
            word.replace(',', ", ").trim_end().to_owned()
        } else {
            word.to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Bytes with a decimal unit: `999 B`, `1.5 kB`.
#[must_use]
pub(super) fn bytes(number: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if number < 1000 {
        return format!("{number} B");
    }
    let (mut whole, mut tenths, mut unit) = (number, 0, "B");
    for next in UNITS {
        if whole < 1000 {
            break;
        }
        tenths = whole % 1000 / 100;
        whole /= 1000;
        unit = next;
    }
    format!("{whole}.{tenths} {unit}")
}

/// A share in percent, with as many decimals as show something: `0.1%`, `25.0%`.
#[must_use]
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let thousandths = u128::from(part) * 100_000 / u128::from(whole);
    if thousandths < 1000 && part > 0 {
        format!("0.{thousandths:03}%")
    } else {
        format!("{}.{}%", thousandths / 1000, thousandths % 1000 / 100)
    }
}

/// A length of time in the two largest units that it has: `1.5s`, `3m12s`, `2d4h`.
#[must_use]
pub(super) fn time(seconds: f64) -> String {
    let tenths = (seconds.max(0.0) * 10.0).round();
    if tenths < 600.0 {
        return format!("{:.1}s", tenths / 10.0);
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative, and the cast saturates"
    )]
    let whole = (tenths / 10.0) as u64;
    let (days, hours, minutes, seconds) = (
        whole / 86_400,
        whole / 3600 % 24,
        whole / 60 % 60,
        whole % 60,
    );
    match (days, hours) {
        (0, 0) => format!("{minutes}m{seconds}s"),
        (0, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// How long ago a time was, seen from another; `never` for none.
#[must_use]
pub(super) fn age(then: Option<Timestamp>, now: Timestamp) -> String {
    match then {
        Some(then) => format!("{} ago", time(now.duration_since(then).as_secs_f64())),
        None => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tables_have_neither_colour_nor_trailing_blanks() {
        let mut table = Table::new(&["NAME", "STATE", "FAULT"]);
        table.row(vec![
            "a-long-name".into(),
            toned(Tone::Good, "active"),
            "cut".into(),
        ]);
        table.row(vec!["b".into(), toned(Tone::Bad, "gone"), String::new()]);
        assert_eq!(
            Output::plain().table(&table),
            "NAME         STATE   FAULT\na-long-name  active  cut\nb            gone\n"
        );
    }

    #[test]
    fn tables_on_terminals_keep_their_layout_under_colour() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["a".into(), toned(Tone::Good, "active")]);
        table.row(vec!["b".into(), "active".into()]);
        let text = coloured(&table.grid(Some(80)));
        assert!(text.contains("\u{1b}[32mactive\u{1b}[0m"), "{text:?}");
        let bare = anstream::adapter::strip_str(&text).to_string();
        assert_eq!(
            bare,
            "NAME  STATE\n─────────────\na     active\nb     active\n"
        );
    }

    #[test]
    fn long_lists_are_broken_at_their_commas() {
        assert_eq!(
            breakable("src 10.0.0.1,fd00::1, tcp"),
            "src 10.0.0.1,fd00::1, tcp"
        );
        assert_eq!(
            breakable("src 10.0.0.1,10.0.0.2,10.0.0.3, tcp"),
            "src 10.0.0.1, 10.0.0.2, 10.0.0.3, tcp"
        );
    }

    #[test]
    fn rare_columns_are_shown_where_they_say_something() {
        let mut table = Table::new(&["NAME", "LAPSED", "FULL"]).sparing(&["LAPSED", "FULL"]);
        table.row(vec!["a".into(), "0".into(), "0".into()]);
        assert_eq!(Output::plain().table(&table), "NAME\na\n");
        table.row(vec!["b".into(), toned(Tone::Bad, "3"), "0".into()]);
        assert_eq!(
            Output::plain().table(&table),
            "NAME  LAPSED\na     0\nb     3\n"
        );
        assert!(!table.grid(Some(80)).contains("FULL"));
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1500), "1.5 kB");
        assert_eq!(bytes(12_345_678), "12.3 MB");
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(percent(0, 10), "0.0%");
        assert_eq!(percent(1, 10_000), "0.010%");
        assert_eq!(percent(1, 4), "25.0%");
        assert_eq!(percent(7, 7), "100.0%");
        assert_eq!(time(0.04), "0.0s");
        assert_eq!(time(59.94), "59.9s");
        assert_eq!(time(192.0), "3m12s");
        assert_eq!(time(7500.0), "2h5m");
        assert_eq!(time(360_000.0), "4d4h");
    }
}
