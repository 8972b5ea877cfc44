"""The configurations, which the wheel holds as deebert/conf."""
