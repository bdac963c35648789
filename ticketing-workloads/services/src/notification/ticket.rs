//! The ticket: a PDF page with a code that the entrance scans.

use super::outbox::Message;
use pdf_writer::{Content, Finish, Name, Pdf, Rect, Ref, Str};
use qrcode::{Color, EcLevel, QrCode};

/// A6, upright, in points.
const PAGE: (f32, f32) = (298.0, 420.0);
const MARGIN: f32 = 28.0;
/// Width of the code with its quiet zone.
const CODE_WIDTH: f32 = 200.0;
/// Modules of quiet around a code (ISO/IEC 18004).
const QUIET: usize = 4;
/// Letters of a line.
const LINE: usize = 38;

/// What is in the code: which booking, and for how many.
fn payload(message: &Message) -> String {
    format!("TICKETWAVE:1:{}:{}", message.booking, message.seats)
}

/// The code, as rows of dark and light; `None`: what it says does not fit.
fn code(text: &str) -> Option<Vec<Vec<bool>>> {
    let code = QrCode::with_error_correction_level(text, EcLevel::M).ok()?;
    let dark: Vec<bool> = code.to_colors().into_iter().map(|color| color == Color::Dark).collect();
    Some(dark.chunks(code.width()).map(<[bool]>::to_vec).collect())
}

/// The ticket as a PDF.
pub fn pdf(message: &Message) -> Vec<u8> {
    let [catalog, pages, page, font, content] = [1, 2, 3, 4, 5].map(Ref::new);
    let name = Name(b"F1");
    let mut pdf = Pdf::new();
    pdf.catalog(catalog).pages(pages);
    pdf.pages(pages).kids([page]).count(1);
    let mut sheet = pdf.page(page);
    sheet.media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1)).parent(pages).contents(content);
    sheet.resources().fonts().pair(name, font);
    sheet.finish();
    pdf.type1_font(font).base_font(Name(b"Helvetica")).encoding_predefined(Name(b"WinAnsiEncoding"));

    let mut drawing = Content::new();
    let mut y = PAGE.1 - MARGIN - 16.0;
    let mut line = |drawing: &mut Content, size: f32, text: &str| {
        drawing.begin_text().set_font(name, size).next_line(MARGIN, y).show(Str(&win_ansi(text))).end_text();
        y -= size * 1.5;
    };
    line(&mut drawing, 18.0, "TicketWave");
    for part in wrapped(&message.event) {
        line(&mut drawing, 13.0, &part);
    }
    if let Some(starts_at) = &message.starts_at {
        line(&mut drawing, 10.0, starts_at);
    }
    let seats = if message.seats == 1 { "1 seat".to_owned() } else { format!("{} seats", message.seats) };
    line(&mut drawing, 10.0, &seats);
    for part in wrapped(&message.user) {
        line(&mut drawing, 10.0, &part);
    }
    line(&mut drawing, 7.0, &message.booking.to_string());
    if let Some(rows) = code(&payload(message)) {
        draw(&mut drawing, &rows);
    }
    pdf.stream(content, &drawing.finish());
    pdf.finish()
}

/// Draws the code in the middle of the lower part of the page.
#[expect(clippy::cast_precision_loss, reason = "a code has at most 177 modules")]
fn draw(drawing: &mut Content, rows: &[Vec<bool>]) {
    let module = CODE_WIDTH / (rows.len() + 2 * QUIET) as f32;
    let left = (PAGE.0 - CODE_WIDTH) / 2.0;
    let top = MARGIN + CODE_WIDTH;
    drawing.set_fill_gray(0.0);
    for (y, row) in rows.iter().enumerate() {
        let bottom = top - module * (y + QUIET + 1) as f32;
        for (x, dark) in row.iter().enumerate() {
            if *dark {
                drawing.rect(left + module * (x + QUIET) as f32, bottom, module, module);
            }
        }
    }
    drawing.fill_nonzero();
}

/// Text as the font has it; what it lacks is a question mark.
fn win_ansi(text: &str) -> Vec<u8> {
    let letter = |letter: char| match letter {
        ' '..='~' | '\u{a0}'..='\u{ff}' => u8::try_from(u32::from(letter)).unwrap_or(b'?'),
        '€' => 0x80,
        '‘' => 0x91,
        '’' => 0x92,
        '“' => 0x93,
        '”' => 0x94,
        '–' => 0x96,
        '—' => 0x97,
        _ => b'?',
    };
    text.chars().map(letter).collect()
}

/// At most three lines, broken between words where that is possible.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for (nth, part) in letters.chunks(LINE).enumerate() {
            let part: String = part.iter().collect();
            match lines.last_mut() {
                Some(line) if nth == 0 && line.chars().count() + 1 + part.chars().count() <= LINE => {
                    if !line.is_empty() {
                        line.push(' ');
                    }
                    line.push_str(&part);
                }
                _ => lines.push(part),
            }
        }
    }
    lines.retain(|line| !line.is_empty());
    lines.truncate(3);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notification::outbox::Kind;

    fn message() -> Message {
        Message::example(Kind::Ticket, "Blue Man’s Opening Night – a very long evening with many guests")
    }

    /// A camera's view of the code: each module eight pixels wide.
    #[test]
    fn the_code_can_be_scanned() {
        let rows = code(&payload(&message())).unwrap();
        let side = (rows.len() + 2 * QUIET) * 8;
        let dark = |x: usize, y: usize| {
            let at = |pixel: usize| (pixel / 8).checked_sub(QUIET);
            at(x).zip(at(y)).and_then(|(x, y)| rows.get(y)?.get(x).copied()).unwrap_or(false)
        };
        let mut image =
            rqrr::PreparedImage::prepare_from_greyscale(side, side, |x, y| if dark(x, y) { 0 } else { 255 });
        let (_, text) = image.detect_grids()[0].decode().unwrap();
        assert_eq!(text, "TICKETWAVE:1:33333333-3333-4333-8333-333333333333:2");
    }

    #[test]
    fn it_is_a_pdf_with_the_code_on_it() {
        let pdf = pdf(&message());
        assert!(pdf.starts_with(b"%PDF-1.") && pdf.ends_with(b"%%EOF"));
        let text = String::from_utf8_lossy(&pdf);
        let dark = code(&payload(&message())).unwrap().into_iter().flatten().filter(|dark| *dark).count();
        assert_eq!(text.matches(" re\n").count(), dark);
        assert!(text.contains("(TicketWave)"));
    }

    #[test]
    fn letters_that_the_font_lacks_do_no_harm() {
        assert_eq!(win_ansi("Señor 東 (1)\n"), b"Se\xf1or ? (1)?");
        assert_eq!(wrapped(&"x".repeat(1_000)).len(), 3);
        assert_eq!(wrapped("one two"), ["one two"]);
        let title = wrapped("Blue Man’s Opening Night – a very long evening");
        assert_eq!(title, ["Blue Man’s Opening Night – a very long", "evening"]);
    }
}
