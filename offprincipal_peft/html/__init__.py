"""Pages that stand alone: charts as inline SVG, tables, images and the CSS around them. Standard library only."""
