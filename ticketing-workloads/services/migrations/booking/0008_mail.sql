-- `last_error`: why a mail was not sent when it was tried last, in the words of the mail server. `waiting_since`: for how long
-- it has been tried; begins anew when it is put back. `domain`: where it goes, for the limit of one, as the buyer wrote it.
ALTER TABLE outbox
    ADD COLUMN last_error    text,
    ADD COLUMN waiting_since timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN domain        text COLLATE "C" NOT NULL DEFAULT '';

-- The domain of a message is found where it is written, so that services of the version before need not know of it.
CREATE FUNCTION outbox_domain() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.domain := COALESCE((SELECT lower(split_part(email, '@', 2)) FROM bookings WHERE id = NEW.booking_id), '');
    RETURN NEW;
END $$;

CREATE TRIGGER outbox_domain BEFORE INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION outbox_domain();
