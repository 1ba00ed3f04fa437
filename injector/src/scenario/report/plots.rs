//! Plots of a run as SVG, all over the same time.
//!
//! Colours are drawn as fixed values and overridden by the page's style sheet (attribute selectors), so that the plots
//! follow the page into dark mode and onto paper. The hues are those of Okabe and Ito (2008), which colour-blind people
//! can tell apart.

use plotters::{
    chart::{ChartBuilder, LabelAreaPosition},
    coord::Shift,
    drawing::DrawingAreaErrorKind,
    element::{Circle, Cross, PathElement, Rectangle},
    prelude::{DrawingArea, IntoDrawingArea, SVGBackend},
    series::LineSeries,
    style::{Color, RGBColor, ShapeStyle},
};

use super::story::Story;

/// Okabe and Ito: blue, vermilion, bluish green, orange, reddish purple, sky blue, yellow.
pub(super) const HUES: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(240, 228, 66),
];
/// What stands for the text's colour.
pub(super) const INK: RGBColor = RGBColor(1, 1, 1);
/// What stands for lines in the background.
pub(super) const RULES: RGBColor = RGBColor(221, 221, 221);
/// What stands for windows of faults.
pub(super) const WINDOW: RGBColor = RGBColor(238, 210, 202);
/// A failure.
pub(super) const BAD: RGBColor = HUES[1];
/// Size of a plot in pixels.
const SIZE: (u32, u32) = (960, 220);
/// Points of a line: one for each column of pixels, twice over.
const MOST_POINTS: usize = 2 * 960;

type Failed = DrawingAreaErrorKind<std::io::Error>;

/// A line of a plot.
pub(super) struct Line {
    pub(super) name: String,
    /// Points that are joined, in parts that are not.
    pub(super) parts: Vec<Vec<(f64, f64)>>,
    /// Points that are marked as failures.
    pub(super) failures: Vec<(f64, f64)>,
}

/// Lines over the time of the run, with the windows of faults behind them.
pub(super) fn lines(story: &Story<'_>, lines: &[Line], unit: &str) -> Result<String, Failed> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(&area, story, lines, unit)?;
        area.present()?;
    }
    Ok(svg)
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    story: &Story<'_>,
    lines: &[Line],
    unit: &str,
) -> Result<(), Failed> {
    let top = lines
        .iter()
        .flat_map(|line| line.parts.iter().flatten().chain(&line.failures))
        .map(|(_, value)| *value)
        .fold(0.0_f64, f64::max);
    let top = if top > 0.0 { top * 1.08 } else { 1.0 };
    let length = story.length.max(0.1);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 32)
        .build_cartesian_2d(0.0..length, 0.0..top)?;
    chart.draw_series(story.faults.iter().map(|fault| {
        Rectangle::new(
            [(fault.from, 0.0), (fault.to.max(fault.from), top)],
            WINDOW.filled(),
        )
    }))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(RULES.stroke_width(0))
        .bold_line_style(RULES)
        .axis_style(INK)
        .label_style(("sans-serif", 12, &INK))
        .x_desc("seconds")
        .y_desc(unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| short(*y))
        .draw()?;
    for (moment, hue) in [(story.steady, HUES[2]), (story.healed, HUES[2])] {
        if let Some(at) = moment {
            let style: ShapeStyle = hue.stroke_width(1);
            chart.draw_series([PathElement::new(vec![(at, 0.0), (at, top)], style)])?;
        }
    }
    for (line, hue) in lines.iter().zip(HUES.iter().cycle()) {
        let all: usize = line.parts.iter().map(Vec::len).sum();
        for part in &line.parts {
            let points = thinned(part, all);
            // A line through a single point is not seen.
            if let [point] = points.as_slice() {
                chart.draw_series([Circle::new(*point, 2, hue.filled())])?;
            }
            chart.draw_series(LineSeries::new(points, hue.stroke_width(2)))?;
        }
        chart.draw_series(
            thinned(&line.failures, line.failures.len())
                .into_iter()
                .map(|point| Cross::new(point, 4, BAD.stroke_width(2))),
        )?;
    }
    Ok(())
}

/// Numbers as they fit beside an axis.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 1e6 => format!("{:.1}M", value / 1e6),
        large if large >= 1e4 => format!("{:.0}k", value / 1e3),
        large if large >= 10.0 || value == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

/// Of a line of `all` points at most so many as can be told apart: of each stretch the lowest and the highest.
fn thinned(points: &[(f64, f64)], all: usize) -> Vec<(f64, f64)> {
    if all <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = all.div_ceil(MOST_POINTS / 2);
    points
        .chunks(stretch)
        .flat_map(|chunk| {
            let by = |one: &&(f64, f64), other: &&(f64, f64)| one.1.total_cmp(&other.1);
            let low = chunk.iter().min_by(by);
            let high = chunk.iter().max_by(by);
            let mut both: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
            both.sort_by(|one, other| one.0.total_cmp(&other.0));
            both
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_survive_thinning() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|n| (f64::from(n), 1.0)).collect();
        points[54_321].1 = 99.0;
        let thin = thinned(&points, points.len());
        assert!(thin.len() <= MOST_POINTS);
        assert!(thin.contains(&(54_321.0, 99.0)));
        assert!(thin.windows(2).all(|two| two[0].0 <= two[1].0));
        assert_eq!(thinned(&points[..10], 10), points[..10]);
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (12.4, "12"),
            (12_345.0, "12k"),
            (2_500_000.0, "2.5M"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
