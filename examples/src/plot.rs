//! The loss curve as a picture.

use std::path::Path;

use plotters::prelude::*;

use crate::Error;
use crate::Result;
use crate::files;

/// Draws the loss of each step (from 1) as an SVG file.
///
/// # Errors
/// If the file cannot be written.
pub fn loss_curve(path: &Path, title: &str, losses: &[f32]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, losses)
        .map_err(|e| Error::model(path, format!("cannot draw the loss curve: {e}")))?;
    files::write_bytes(path, svg.as_bytes())
}

fn draw(
    svg: &mut String,
    title: &str,
    losses: &[f32],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let top = losses
        .iter()
        .copied()
        .filter(|x| x.is_finite())
        .fold(0f32, f32::max)
        * 1.05;
    let area = SVGBackend::with_string(svg, (800, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(1f32..losses.len().max(2) as f32, 0f32..top.max(1e-3))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_desc("loss")
        .light_line_style(WHITE)
        .draw()?;
    let points = || {
        losses
            .iter()
            .enumerate()
            .map(|(i, loss)| ((i + 1) as f32, *loss))
    };
    chart.draw_series(LineSeries::new(points(), BLUE.mix(0.3)))?;
    // The trend: the mean of each step and its two neighbours on either side.
    let trend = (0..losses.len()).map(|i| {
        let around = &losses[i.saturating_sub(2)..losses.len().min(i + 3)];
        let mean = around.iter().sum::<f32>() / around.len() as f32;
        ((i + 1) as f32, mean)
    });
    chart.draw_series(LineSeries::new(trend, BLUE.stroke_width(2)))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curve_has_a_point_for_each_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        loss_curve(&path, "loss", &[3., 2., 1.]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        let lines: Vec<_> = svg
            .lines()
            .filter(|line| line.contains("<polyline"))
            .collect();
        let curve = lines.iter().find(|line| line.matches(',').count() == 3);
        assert!(curve.is_some(), "{svg}");
        loss_curve(&path, "nothing yet", &[]).unwrap();
        loss_curve(&path, "diverged", &[1., f32::NAN, f32::INFINITY]).unwrap();
    }
}
