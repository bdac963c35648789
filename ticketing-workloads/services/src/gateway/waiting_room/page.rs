//! The page of the waiting room: nothing from elsewhere, readable by a screen reader, and of use without a script.

use super::Standing;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const STYLE: &str = "
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5 }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: Canvas; color: CanvasText }
main { box-sizing: border-box; width: 100%; max-width: 34rem; padding: 2rem }
h1 { font-size: 1.6rem; margin: 0 0 1rem }
dl { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin: 1.5rem 0 }
dt { font-size: .9rem } dd { margin: 0; font-size: 2rem; font-variant-numeric: tabular-nums }
a { display: inline-block; padding: .7rem 1.4rem; border-radius: .4rem; background: #0b57d0; color: #fff; text-decoration: none }
a:focus-visible { outline: 3px solid currentColor; outline-offset: 3px }
[hidden] { display: none }
";

/// Looks again when the answer says so, and goes on when it is the buyer's turn.
const SCRIPT: &str = "
const by = id => document.getElementById(id);
const wait = seconds => seconds < 60 ? 'less than a minute' : seconds < 120 ? 'about a minute'
  : seconds < 7200 ? `about ${Math.round(seconds / 60)} minutes` : `about ${Math.round(seconds / 3600)} hours`;
const turn = place => {
  by('title').textContent = place.admitted ? 'It is your turn' : place.status === 'Waiting' ? 'Please wait' : 'The waiting room';
  by('message').textContent = place.message;
  const waits = place.status === 'Waiting';
  by('figures').hidden = !waits; by('stay').hidden = !waits; by('on').hidden = waits;
  if (waits) { by('position').textContent = place.position; by('estimate').textContent = wait(place.estimateSeconds); }
  document.title = waits ? `${place.position} – TicketWave` : `${by('title').textContent} – TicketWave`;
};
const look = async () => {
  let seconds = 10;
  try {
    const answer = await fetch('/api/waiting-room', { cache: 'no-store' });
    if (answer.ok) {
      const place = await answer.json();
      turn(place);
      if (place.admitted) { location.replace(by('on').href); return; }
      if (place.status !== 'Waiting') return;
      seconds = place.retryAfterSeconds;
    }
  } catch { /* The next look may do better. */ }
  setTimeout(look, seconds * 1000);
};
if (!by('figures').hidden) setTimeout(look, Number(document.body.dataset.retry) * 1000);
";

/// The page, for each standing.
pub struct Page {
    /// Where it goes on to, as HTML has it.
    shop: String,
    policy: Option<HeaderValue>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

/// An estimate, as people say it.
fn in_words(seconds: u64) -> String {
    match seconds {
        0..60 => "less than a minute".to_owned(),
        60..120 => "about a minute".to_owned(),
        120..7_200 => format!("about {} minutes", (seconds + 30) / 60),
        _ => format!("about {} hours", (seconds + 1_800) / 3_600),
    }
}

impl Page {
    pub fn new(shop_url: &str) -> Self {
        let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
        let policy = format!(
            "default-src 'none'; style-src {}; script-src {}; connect-src 'self'; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'",
            hash(STYLE),
            hash(SCRIPT)
        );
        Self { shop: escape(shop_url), policy: HeaderValue::from_str(&policy).ok() }
    }

    pub(super) fn show(&self, standing: &Standing, retry_after: u64) -> Response {
        let mut response = Html(self.html(standing, retry_after)).into_response();
        let headers = response.headers_mut();
        let fixed = [
            (header::CACHE_CONTROL, "no-store"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "same-origin"),
            (HeaderName::from_static("x-frame-options"), "DENY"),
        ];
        headers.extend(fixed.map(|(name, value)| (name, HeaderValue::from_static(value))));
        headers.extend(self.policy.clone().map(|policy| (header::CONTENT_SECURITY_POLICY, policy)));
        response
    }

    fn html(&self, standing: &Standing, retry_after: u64) -> String {
        let shop = &self.shop;
        let title = match standing {
            Standing::Waiting { .. } => "Please wait",
            Standing::Admitted | Standing::NotNeeded => "It is your turn",
            Standing::NoPlace | Standing::Lapsed => "The waiting room",
        };
        let (position, estimate) = match standing {
            Standing::Waiting { ahead, seconds } => (ahead + 1, in_words(*seconds)),
            _ => (0, String::new()),
        };
        let waits = matches!(standing, Standing::Waiting { .. });
        let (unless_waits, if_waits) = if waits { ("", " hidden") } else { (" hidden", "") };
        let refresh = match standing {
            Standing::Waiting { .. } => {
                format!("<noscript><meta http-equiv=\"refresh\" content=\"{retry_after}\"></noscript>")
            }
            // In a moment, so that it can be read.
            Standing::Admitted => format!("<meta http-equiv=\"refresh\" content=\"3; url={shop}\">"),
            _ => String::new(),
        };
        let message = escape(&standing.message());
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title} – TicketWave</title>\n\
             {refresh}\n<style>{STYLE}</style>\n</head>\n<body data-retry=\"{retry_after}\">\n<main>\n\
             <h1 id=\"title\">{title}</h1>\n<p id=\"message\" role=\"status\">{message}</p>\n\
             <dl id=\"figures\"{unless_waits}>\n<div><dt>Your position</dt><dd id=\"position\">{position}</dd></div>\n\
             <div><dt>Estimated wait</dt><dd id=\"estimate\">{estimate}</dd></div>\n</dl>\n\
             <p id=\"stay\"{unless_waits}>Your place is kept while you are away. This page goes on by itself.</p>\n\
             <p><a id=\"on\" href=\"{shop}\"{if_waits}>Go on to the tickets</a></p>\n</main>\n\
             <script>{SCRIPT}</script>\n</body>\n</html>\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_the_buyer_stands_and_goes_on_without_a_script() {
        let page = Page::new("/?a=1&b=\"2");
        let waiting = page.html(&Standing::Waiting { ahead: 41, seconds: 300 }, 17);
        for part in [
            "<dd id=\"position\">42</dd>",
            "about 5 minutes",
            "41 buyers are ahead of you.",
            "content=\"17\"",
            "href=\"/?a=1&amp;b=&quot;2\" hidden",
        ] {
            assert!(waiting.contains(part), "{part} is missing in\n{waiting}");
        }
        let admitted = page.html(&Standing::Admitted, 1);
        assert!(
            admitted.contains("content=\"3; url=/?a=1&amp;b=&quot;2\"") && admitted.contains("id=\"figures\" hidden")
        );
        let lapsed = page.html(&Standing::Lapsed, 1);
        assert!(lapsed.contains("Your turn is over") && !lapsed.contains("http-equiv"));
    }

    #[test]
    fn nothing_comes_from_elsewhere() {
        let response = Page::new("/").show(&Standing::NoPlace, 1);
        let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
        let html = Page::new("/").html(&Standing::NoPlace, 1);
        assert!(!html.contains("http://") && !html.contains("https://") && !html.contains(" style="), "{html}");
        assert_eq!(response.headers()["cache-control"], "no-store");
    }

    #[test]
    fn an_estimate_is_said_as_people_say_it() {
        assert_eq!(in_words(59), "less than a minute");
        assert_eq!(in_words(119), "about a minute");
        assert_eq!(in_words(150), "about 3 minutes");
        assert_eq!(in_words(7_200), "about 2 hours");
    }
}
